from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.errors import ModelNotFoundError, OfflineError, OptionError
from fastserve.hub.download import download
from fastserve.hub.registry import list_models
from fastserve.hub.resolve import resolve
from hub.conftest import CatalogueOf
from hub.wheel_index import WheelIndex


def test_a_folder_is_used_where_it_is_and_not_registered(model_folder: Path) -> None:
    assert resolve(model_folder) == model_folder
    assert resolve(str(model_folder), offline=True) == model_folder
    assert list_models() == []


def test_a_gguf_file_is_used_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    assert resolve(path) == path


def test_a_folder_without_a_model_does_not_hide_a_known_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all-minilm-l6-v2").mkdir()
    with pytest.raises(OfflineError):
        resolve("all-minilm-l6-v2", offline=True)


def test_an_empty_name_is_not_the_current_folder(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_folder)
    with pytest.raises(ModelNotFoundError, match="name is empty"):
        resolve("")


@pytest.mark.parametrize("offline", [True, False])
def test_an_unclear_offline_setting_is_refused_for_a_path_too(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    monkeypatch.setenv("FASTSERVE_OFFLINE", "zz")
    with pytest.raises(OptionError, match="FASTSERVE_OFFLINE=zz"):
        resolve(model_folder, offline=offline)


def test_a_known_name_is_downloaded_and_given_as_its_folder(
    index: WheelIndex, catalogue_of: CatalogueOf, store: Path
) -> None:
    catalogue_of("tiny", index.add_model("tiny-model==1.0"))
    assert resolve("Tiny") == store / "models" / "tiny" / "files"
    assert resolve("tiny", offline=True) == store / "models" / "tiny" / "files"


def test_a_model_that_is_one_gguf_file_is_given_as_that_file(index: WheelIndex, store: Path) -> None:
    index.add("tiny-gguf==1", {"tiny_gguf/m.Q8_0.gguf": b"GGUF", "tiny_gguf/LICENSE": b"MIT"})
    assert resolve("pypi:tiny-gguf==1") == store / "models" / "tiny-gguf==1" / "files" / "m.Q8_0.gguf"


def test_a_registered_model_is_found_by_the_name_it_was_given(index: WheelIndex) -> None:
    index.add_model("tiny-model==1.0")
    assert resolve("pypi:tiny-model==1.0") == resolve("tiny-model==1.0", offline=True)


def test_a_path_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="holds no model"):
        resolve(tmp_path)
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        resolve(tmp_path / "missing")


@pytest.mark.parametrize("text", ["Once upon a time " * 300, "a\0b"])
def test_a_text_that_can_be_no_path_is_an_unknown_name(text: str) -> None:
    with pytest.raises(ModelNotFoundError):
        resolve(text)


def test_a_folder_is_registered_under_its_own_name_however_it_is_reached(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model_folder / "deeper").mkdir()
    monkeypatch.chdir(model_folder / "deeper")
    assert download("..").name == "My-Model"
