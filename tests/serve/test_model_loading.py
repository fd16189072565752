"""From names on a command line to models that are served: aliases, versions, the promoted one, budgets."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastserve.config import EngineOptions
from fastserve.errors import ContextLengthError, ModelMemoryError, ModelNotFoundError, OptionError
from fastserve.hub.alias import add_alias, promote, remove_name
from fastserve.hub.download import download
from fastserve.hub.name_table import NameTable
from fastserve.hub.registry import remove_model
from fastserve.serve.model_entry import ModelEntry
from fastserve.serve.model_loading import find_models
from fastserve.serve.model_table import ModelTable
from fastserve.serve.options import ServeOptions
from fastserve.serve.snapshot import describe_model, describe_models
from serve.conftest import OPTIONS

pytest.importorskip("fastserve._native")

EACH = 68 * 2**20  # about what the model takes: a margin, and little else


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of its own."""
    monkeypatch.setenv("FASTSERVE_HOME", str(tmp_path / "store"))
    monkeypatch.setenv("FASTSERVE_OFFLINE", "1")
    return tmp_path / "store"


@pytest.fixture
def two(store: Path, tmp_path: Path, stories_for_chat: Path) -> tuple[Path, Path]:
    """Registered models `one` and `two`: the same, in two folders."""
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        shutil.copytree(stories_for_chat, folder)
        download(str(folder))
    return folders


def find(*texts: str, engine: EngineOptions = OPTIONS, **options: Any) -> ModelTable:
    return find_models(texts, ServeOptions(**options), engine)


def states(table: ModelTable) -> dict[str, str]:
    return {entry.name: entry.state for entry in table.entries}


def close(table: ModelTable) -> None:
    asyncio.run(table.close())


def change_names(store: Path) -> None:
    """Have the table of names look changed, however coarse the file system's clock is."""
    path = NameTable.path(store)
    stamp = path.stat().st_mtime_ns
    os.utime(path, ns=(stamp, stamp + 1_000_000))


def test_without_a_budget_all_are_loaded_at_the_start(two) -> None:
    table = find("one", str(two[1]))
    table.set_up()
    assert states(table) == {"one": "loaded", "two": "loaded"}
    assert {model.name for model in table} == {"one", "two"}
    assert table.memory.budget_bytes is None
    close(table)


def test_with_a_budget_only_pinned_ones_are(two) -> None:
    table = find("one", "two", model_memory=2 * EACH, pinned=["two"])
    table.set_up()
    assert states(table) == {"one": "unloaded", "two": "loaded"}
    one, two_ = describe_models(table)
    assert (one.is_pinned, two_.is_pinned) == (False, True)
    assert EACH - 2 * 2**20 < one.memory_bytes == two_.memory_bytes < EACH
    assert (one.task, one.idle_seconds) == ("generate", None)
    close(table)


@pytest.mark.parametrize(
    ("budget", "pinned", "message"),
    [
        (EACH // 2, [], r"the model 'one' needs \d+ MiB of memory; 34 MiB of the 34 MiB of model_memory"),
        (3 * EACH // 2, ["two"], r"pinned are two \(\d+ MiB\)"),
    ],
)
def test_what_can_never_fit_is_refused_before_anything_is_loaded(two, budget, pinned, message) -> None:
    table = find("one", "two", model_memory=budget, pinned=pinned)
    with pytest.raises(ModelMemoryError, match=message):
        table.set_up()
    assert states(table) == {"one": "unloaded", "two": "unloaded"}


def test_memory_that_options_leave_open_is_a_part_of_the_budget(two) -> None:
    options = EngineOptions(threads=1, context_length=256)
    table = find("one", "two", engine=options, model_memory=2 * EACH)
    table.set_up()
    entry = table.find("one")
    plan = entry.plan
    assert plan is not None
    assert 2**20 < plan.kv_bytes < EACH
    asyncio.run(table.memory.load(entry))
    assert entry.plan == plan
    close(table)


def test_beside_others_a_model_that_was_made_for_less_context_has_its_own(two) -> None:
    path = two[1] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 128}))
    with pytest.raises(ContextLengthError, match="context_length is 256; the model was made for 128"):
        find(str(two[1])).set_up()
    table = find("one", str(two[1]), model_memory="1GiB")
    table.set_up()
    asyncio.run(table.memory.load(table.find("two")))
    contexts = [None if entry.plan is None else entry.plan.context_length for entry in table.entries]
    assert contexts == [256, 128]
    model = table.find("two").model
    assert model is not None
    assert model.model.context_length == 128
    close(table)


def test_aliases_stand_for_models_that_are_served_and_others_for_none(two, store) -> None:
    add_alias("chat", "one")
    add_alias("talk", "chat")
    add_alias("other", "two")
    table = find("talk", model_memory="1GiB")
    one = table.find("one")
    assert table.find("chat") is table.find("TALK") is one
    assert table.names() == ["one", "chat", "talk"]
    assert describe_model(table, one).aliases == ["chat", "talk"]
    with pytest.raises(ModelNotFoundError, match=r"'other'.* this server has one, chat, talk"):
        table.find("other")
    add_alias("new", "one")
    remove_name("talk")
    change_names(store)
    assert table.find("new") is one
    with pytest.raises(ModelNotFoundError, match="this server has one, chat, new"):
        table.find("talk")


def test_a_name_with_versions_stands_for_all_and_answers_by_the_promoted_one(two, store) -> None:
    add_alias("chat@1", "one")
    add_alias("chat@2", "two")
    promote("chat@1")
    table = find("chat", model_memory="1GiB")
    assert list(states(table)) == ["chat@1", "chat@2"]
    assert (table.find("chat").name, table.find("chat@2").version) == ("chat@1", "2")
    assert describe_model(table, table.find("chat")).aliases == ["chat"]
    promote("chat@2")
    add_alias("chat@3", "one")
    change_names(store)
    assert (table.find("chat").name, table.find("chat@3").name) == ("chat@2", "chat@3")
    with pytest.raises(ModelNotFoundError, match=r"has no version '4'.* has chat@1, chat@2, chat@3"):
        table.find("chat@4")


def test_without_a_budget_the_promoted_version_is_loaded_and_must_be_there(two) -> None:
    add_alias("chat@1", "one")
    add_alias("chat@2", "two")
    with pytest.raises(ModelNotFoundError, match="no version of chat is promoted"):
        find("chat")
    table = find("chat", model_memory="1GiB")
    with pytest.raises(ModelNotFoundError, match="no version of 'chat' is promoted"):
        table.find("chat")
    promote("chat@2")
    table = find("chat")
    table.set_up()
    assert states(table) == {"chat@1": "unloaded", "chat@2": "loaded"}
    asyncio.run(table.memory.load(table.find("chat@1")))
    assert states(table) == {"chat@1": "loaded", "chat@2": "loaded"}
    close(table)


def test_a_version_that_is_removed_is_not_there_any_more_and_its_memory_goes(two, store) -> None:
    add_alias("chat@1", "one")
    add_alias("chat@2", "two")
    table = find("chat", model_memory="1GiB")
    old = table.find("chat@1")

    async def main() -> None:
        await table.memory.load(old)
        remove_name("chat@1")
        change_names(store)
        with pytest.raises(ModelNotFoundError, match=r"has no version '1'.* has chat@2"):
            table.find("chat@1")
        assert table.names() == ["chat@2"]
        while old.state != "unloaded":
            await asyncio.sleep(0.01)
        assert table.memory.used_bytes == 0

    asyncio.run(main())


@pytest.mark.parametrize("served", ["chat", "chat@1"])
def test_a_version_that_is_made_anew_between_two_looks_is_another_model(two, store, served: str) -> None:
    """Requests that have the old one keep it to their ends."""
    add_alias("chat@1", "one")
    table = find(served, model_memory="1GiB", pinned=["chat@1"])
    old = table.find("chat@1")
    old.policy = "fcfs"

    async def main() -> None:
        await table.memory.load(old)
        assert old.model is not None
        lease = table.memory.enter(old)
        remove_name("chat@1")
        add_alias("chat@1", "two")
        change_names(store)
        new = table.find("chat@1")
        assert new is not old
        assert (new.is_pinned, new.policy, table.names()) == (True, "fcfs", ["chat@1"])
        assert table.memory.entry_of(old.model) is old
        await table.memory.load(new)
        assert new.model is not None
        assert new.model.model.checkpoint.path.parts[-1] == "two"
        assert old.state == "unloading"
        table.memory.leave(lease)
        while old in table.memory.entries:
            await asyncio.sleep(0.01)
        assert table.memory.used_bytes == new.num_bytes
        await table.close()

    asyncio.run(main())


def test_a_folder_that_is_called_as_a_version_is_none(two, store, tmp_path, stories_for_chat) -> None:
    shutil.copytree(stories_for_chat, tmp_path / "chat@1")
    add_alias("chat@1", "one")
    table = find(str(tmp_path / "chat@1"), model_memory="1GiB")
    entry = table.find("chat@1")
    remove_name("chat@1")
    add_alias("chat@1", "two")
    change_names(store)
    assert table.find("chat@1") is entry


def test_a_downloaded_version_that_comes_and_goes_is_noticed(store, tmp_path, stories_for_chat) -> None:
    """Nobody writes the table of names for it."""
    for version in ("main", "next"):
        shutil.copytree(stories_for_chat, tmp_path / f"net@{version}")
    download(str(tmp_path / "net@main"))
    table = find("net", model_memory="1GiB")
    download(str(tmp_path / "net@next"))
    assert table.find("net@next").version == "next"
    remove_model("net@main")
    with pytest.raises(ModelNotFoundError, match="this server has net@next"):
        table.find("net@main")


def test_one_version_alone_can_be_served(two) -> None:
    add_alias("chat@1", "one")
    add_alias("chat@2", "two")
    promote("chat@2")
    table = find("chat@1", model_memory="1GiB")
    assert list(states(table)) == ["chat@1"]
    with pytest.raises(ModelNotFoundError, match="this server has chat@1"):
        table.find("chat")


def test_a_version_whose_files_have_changed_is_not_loaded(two) -> None:
    add_alias("chat@1", "one")
    table = find("chat@1", model_memory="1GiB")
    (two[0] / "chat_template.jinja").write_text("{{ messages }}")
    download("one")
    with pytest.raises(Exception, match=r"could not be loaded: chat@1 is one, which has other files now"):
        asyncio.run(table.memory.load(table.find("chat@1")))


@pytest.mark.parametrize("content", ["{", '{"version": 9}'])
def test_a_table_of_names_that_breaks_changes_nothing(two, store, caplog, content: str) -> None:
    add_alias("chat", "one")
    table = find("one", model_memory="1GiB")
    NameTable.path(store).write_text(content)
    change_names(store)
    assert table.find("chat").name == "one"
    assert "aliases and versions stay as they were" in caplog.text


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["one", "one"], {}, "two models have one name: one, one"),
        (["one"], {"model_memory": "1GiB", "pinned": ["two"]}, "pinned names 'two'"),
    ],
)
def test_names_that_do_not_go_together_are_refused(two, texts, options, message) -> None:
    with pytest.raises(OptionError, match=message):
        find(*texts, **options)


def test_an_entry_knows_its_version() -> None:
    class Opener:
        plan = open = None

    entries = [ModelEntry(name, opener=Opener()) for name in ("chat", "chat@2", "owner/net@main")]  # type: ignore[arg-type]
    assert [(entry.base, entry.version) for entry in entries] == [
        ("chat", None),
        ("chat", "2"),
        ("owner/net", "main"),
    ]
