from __future__ import annotations

import gzip
import io
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.errors import DownloadError
from fastserve.hub import tar_archive


def info_of(name: str, **attributes: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info


def link(archive: tarfile.TarFile) -> None:
    archive.addfile(info_of("config.json", type=tarfile.SYMTYPE, linkname="/etc/passwd"))


def hard_link(archive: tarfile.TarFile) -> None:
    archive.addfile(info_of("config.json", type=tarfile.LNKTYPE, linkname="other"))


def device(archive: tarfile.TarFile) -> None:
    archive.addfile(info_of("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3))


def twice(archive: tarfile.TarFile) -> None:
    for _ in range(2):
        archive.addfile(info_of("config.json", size=1), io.BytesIO(b"x"))


def many(archive: tarfile.TarFile) -> None:
    for index in range(tar_archive.MAX_MEMBERS + 1):
        archive.addfile(info_of(f"{index}.json"))


def bomb(archive: tarfile.TarFile) -> None:
    archive.addfile(info_of("zeros.gguf", size=50_000_000), io.BytesIO(bytes(50_000_000)))


@pytest.mark.parametrize(
    ("fill", "says"),
    [
        (link, "is a link"),
        (hard_link, "is a link"),
        (device, "a device"),
        (twice, "comes twice"),
        (many, "one of more than 10000"),
        (bomb, "makes 50000000 bytes of .*, more than 100 times"),
    ],
)
def test_members_that_are_not_safe_are_refused(
    tmp_path: Path, fill: Callable[[tarfile.TarFile], None], says: str
) -> None:
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        fill(archive)
    with pytest.raises(DownloadError, match=says):
        tar_archive.member_names(path)


def test_a_header_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    header = info_of("./pax", type=tarfile.XHDTYPE, size=1 << 30).tobuf(tarfile.USTAR_FORMAT)
    with gzip.open(tmp_path / "a.tar.gz", "wb") as file:
        file.write(header)
        file.write(bytes(4 << 20))
    with pytest.raises(DownloadError, match="a header of 1073741824 bytes"):
        tar_archive.member_names(tmp_path / "a.tar.gz")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_archive_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        archive.addfile(info_of("config.json", size=2), io.BytesIO(b"{}"))
        archive.addfile(info_of("m/" + "x" * 150, size=5), io.BytesIO(b"12345"))
    damaged = bytearray(whole.getvalue()[:4096])
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("damaged")
    content = bytes(damaged[: data.draw(st.integers(1, len(damaged)))])
    (folder / "a.tar").write_bytes(gzip.compress(content) if data.draw(st.booleans()) else content)
    (folder / "out").mkdir()
    start = time.process_time()
    with suppress(DownloadError):
        names = tar_archive.member_names(folder / "a.tar")
        tar_archive.extract(folder / "a.tar", {f"{i}": name for i, name in enumerate(names)}, folder / "out")
    assert time.process_time() - start < 1
    assert {path.name for path in folder.iterdir()} == {"a.tar", "out"}
