"""Aliases and versions: each name means one thing, and a version for good."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.errors import CheckpointError, DownloadError, ModelNotFoundError, OptionError
from fastserve.hub.alias import add_alias, promote, remove_name
from fastserve.hub.download import download
from fastserve.hub.registry import Registry, list_models, remove_model, show_model
from fastserve.hub.resolve import resolve


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """Two files of the user's that are registered, as `one` and `two`."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF" + name.encode())
        download(str(tmp_path / f"{name}.gguf"))
    return tmp_path / "one.gguf", tmp_path / "two.gguf"


def test_an_alias_stands_for_a_model_in_any_case_and_can_be_pointed_elsewhere(models) -> None:
    assert add_alias("Chat", "ONE") == "ONE"
    assert resolve("chat", offline=True) == resolve("CHAT", offline=True) == models[0]
    assert show_model("chat").name == "one"
    add_alias("talk", "chat")
    add_alias("chat", "two")
    assert resolve("talk", offline=True) == models[1]


def test_an_alias_may_stand_for_a_model_that_is_yet_to_be_downloaded(store: Path) -> None:
    assert add_alias("small", "all-minilm-l6-v2") == "all-minilm-l6-v2"
    with pytest.raises(DownloadError, match="all-minilm-l6-v2 is not here"):
        resolve("small", offline=True)


def test_the_promoted_version_is_what_a_name_stands_for(models) -> None:
    add_alias("chat@1", "one")
    add_alias("chat@2", "two")
    add_alias("talk", "chat@1")
    with pytest.raises(ModelNotFoundError, match="no version of chat is promoted") as unclear:
        resolve("chat")
    assert "chat@1, chat@2" in str(unclear.value)
    assert promote("chat@1") is None
    assert resolve("chat") == resolve("Chat@1") == models[0]
    assert promote("chat@2") == "1"
    assert (resolve("chat"), resolve("chat@1"), resolve("talk")) == (models[1], models[0], models[0])


def test_aliases_follow_what_is_promoted(models) -> None:
    for version, model in (("1", "one"), ("2", "two")):
        add_alias(f"chat@{version}", model)
        promote(f"chat@{version}")
        add_alias("talk", "chat")
    promote("chat@1")
    assert resolve("talk") == models[0]


def test_models_with_a_revision_in_their_names_are_versions_too(models, tmp_path: Path) -> None:
    for revision in ("v1", "v2"):
        (tmp_path / f"net@{revision}.gguf").write_bytes(b"GGUF" + revision.encode())
        download(str(tmp_path / f"net@{revision}.gguf"))
    promote("net@v2")
    assert resolve("net") == tmp_path / "net@v2.gguf"
    with pytest.raises(ModelNotFoundError, match="versions are net@v1, net@v2"):
        resolve("net@v3")
    remove_model("net@v2")
    with pytest.raises(ModelNotFoundError, match="no version of net is promoted"):
        resolve("net")


def test_an_unknown_version_names_those_that_there_are(models) -> None:
    add_alias("chat@1", "one")
    with pytest.raises(ModelNotFoundError, match=r"chat has no version '2' \(hint: versions are chat@1\)"):
        resolve("chat@2")
    for act in (promote, remove_model):
        with pytest.raises(ModelNotFoundError, match=r"chat has no version '2'.*versions are chat@1"):
            act("chat@2")
    with pytest.raises(ModelNotFoundError, match="models alias other@1 MODEL"):
        promote("other@1")


def test_a_version_does_not_change(models) -> None:
    add_alias("chat@1", "one")
    add_alias("chat@1", "one")
    with pytest.raises(OptionError, match="versions do not change"):
        add_alias("chat@1", "two")
    models[0].write_bytes(b"GGUF, but another")
    download("one")
    assert show_model("one").damaged_files() == []
    with pytest.raises(CheckpointError, match="other files now than when the version was made"):
        resolve("chat@1")


def test_a_version_is_of_a_model_that_is_here(store: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is not downloaded"):
        add_alias("chat@1", "all-minilm-l6-v2")


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("one", "two", "one is a model"),
        ("all-minilm-l6-v2", "two", "all-minilm-l6-v2 is a model"),
        ("one@2", "two", "one is a model"),
        ("a b", "two", "no word"),
        ("", "two", "no word"),
        ("chat@", "two", "no word"),
        ("chat@a/b", "two", "no word"),
        ("../chat", "two", "no word"),
        ("chat", "chat", "no model is named 'chat'"),
        ("chat", "three", "no model is named 'three'"),
    ],
)
def test_a_name_that_means_something_already_or_nothing_is_refused(models, name, target, message) -> None:
    with pytest.raises((OptionError, ModelNotFoundError), match=message):
        add_alias(name, target)
    assert Registry.of_user().names().aliases == {}


def test_aliases_do_not_go_round_in_a_circle(models) -> None:
    add_alias("a", "one")
    add_alias("b", "a")
    with pytest.raises(OptionError, match="a would stand for itself"):
        add_alias("a", "b")
    assert resolve("b") == models[0]


def test_a_name_has_versions_or_is_an_alias(models) -> None:
    add_alias("chat@1", "one")
    with pytest.raises(OptionError, match="chat has versions"):
        add_alias("chat", "two")
    add_alias("talk", "one")
    with pytest.raises(OptionError, match="talk is an alias of one"):
        add_alias("talk@1", "one")


def test_what_others_stand_for_is_not_removed(models) -> None:
    add_alias("chat@1", "one")
    add_alias("talk", "two")
    add_alias("speak", "talk")
    for name, user in (("one", "chat@1"), ("two", "talk")):
        with pytest.raises(OptionError, match=f"{user} stands for {name}"):
            remove_model(name)
    with pytest.raises(OptionError, match="speak stands for talk"):
        remove_name("talk")
    for name in ("speak", "TALK", "chat@1"):
        assert remove_name(name)
    assert not remove_name("talk")
    for name in ("one", "two"):
        remove_model(name)
    assert list_models() == []


def test_a_promoted_version_goes_after_the_others(models) -> None:
    add_alias("chat@1", "one")
    add_alias("chat@2", "two")
    promote("chat@2")
    with pytest.raises(OptionError, match="chat@2 is promoted"):
        remove_name("chat@2")
    remove_name("chat@1")
    remove_name("chat@2")
    with pytest.raises(ModelNotFoundError, match="no model is named 'chat'"):
        resolve("chat")


def test_a_folder_with_the_name_of_an_alias_is_not_registered(models, tmp_path: Path) -> None:
    add_alias("chat", "one")
    (tmp_path / "chat.gguf").write_bytes(b"GGUF")
    with pytest.raises(OptionError, match="which stands for one"):
        download(str(tmp_path / "chat.gguf"))
    assert resolve(tmp_path / "chat.gguf") == tmp_path / "chat.gguf"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"version": 2}', '{"version": 1, "aliases": []}'])
def test_a_table_that_is_none_is_neither_used_nor_replaced(models, store: Path, content: str) -> None:
    (store / "names.json").write_text(content)
    for act in (lambda: resolve("one"), lambda: add_alias("chat", "one"), lambda: promote("chat@1")):
        with pytest.raises(OptionError, match=r"names\.json is no table of names"):
            act()
    assert (store / "names.json").read_text() == content


def test_files_are_verified_against_their_checksums(models) -> None:
    record = show_model("one")
    assert record.verify() == {}
    models[0].write_bytes(b"GGUFtwo")
    assert record.damaged_files() == []
    assert record.verify() == {"one.gguf": f"does not match its sha256 {record.files[0].sha256}"}
    models[0].write_bytes(b"GGUF")
    assert record.verify() == {"one.gguf": "has 4 bytes, not 7"}
    models[0].unlink()
    assert record.verify() == {"one.gguf": "is missing"}
