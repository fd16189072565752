"""Models come and go within a budget: in which order, for whom, and that nobody waits for ever."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from fastserve.engine.loaded_model import ModelPlan
from fastserve.errors import (
    CheckpointError,
    ClosedError,
    MemoryLimitError,
    ModelMemoryError,
    ModelNotFoundError,
    QueueFullError,
    RequestError,
)
from fastserve.models.task import GENERATE
from fastserve.serve.model_entry import ModelEntry
from fastserve.serve.model_memory import ModelMemory

MIB = 2**20
LONG = 30.0  # seconds that no test waits for


class FakeModel:
    """A model that takes memory from when it is opened until it is closed."""

    def __init__(self, opener: FakeOpener) -> None:
        self.name = opener.name
        self.model = SimpleNamespace(
            draft=None,
            settings=GENERATE,
            context_length=8,
            footprint=SimpleNamespace(kv_bytes=1, total_bytes=opener.num_bytes),
        )
        self.is_closed = False
        self._live = opener.live
        self._live.append(self)

    async def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self._live.remove(self)


@dataclass
class FakeOpener:
    name: str
    num_bytes: int
    live: list[FakeModel]  # of all models
    history: list[str]
    budget_bytes: int | None
    errors: list[Exception] = field(default_factory=list)  # of the next loads
    gate: threading.Event | None = None  # loads wait for it
    can_be_given_up: bool = True

    def plan(self) -> ModelPlan:
        return ModelPlan(settings=GENERATE, context_length=8, kv_bytes=1, total_bytes=self.num_bytes)

    def open(self, plan: ModelPlan, check: Callable[[], None] | None = None) -> Any:
        while self.gate is not None and not self.gate.wait(0.001):
            if check is not None and self.can_be_given_up:
                check()
        if self.errors:
            raise self.errors.pop()
        self.history.append(self.name)
        model = FakeModel(self)
        total_bytes = sum(model.model.footprint.total_bytes for model in self.live)
        assert self.budget_bytes is None or total_bytes <= self.budget_bytes
        return model


class Models:
    """A memory with models of given MiB, and what happened to it."""

    def __init__(
        self, sizes: dict[str, int], *, budget: int | None, pinned: str = "", **options: Any
    ) -> None:
        self.live: list[FakeModel] = []
        self.history: list[str] = []  # of loads
        budget_bytes = None if budget is None else budget * MIB
        options = {"retry_seconds": 0.0, **options}
        self.openers = {
            name: FakeOpener(name, size * MIB, self.live, self.history, budget_bytes)
            for name, size in sizes.items()
        }
        self.entries = {
            name: ModelEntry(name, opener=opener, is_pinned=name in pinned)
            for name, opener in self.openers.items()
        }
        for entry in self.entries.values():
            entry.plan = self.openers[entry.name].plan()
        self.memory = ModelMemory(self.entries.values(), budget_bytes=budget_bytes, **options)

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[FakeModel]:
        lease = self.memory.enter(self.entries[name])
        try:
            model: Any = await lease.wait()
            assert not model.is_closed
            yield model
        finally:
            self.memory.leave(lease)

    async def ask(self, name: str, seconds: float = 0.0) -> None:
        async with self.use(name) as model:
            await asyncio.sleep(seconds)
            assert not model.is_closed

    @property
    def loaded(self) -> set[str]:
        return {model.name for model in self.live}

    async def settle(self) -> None:
        while self.memory._wanted or any(entry.changing for entry in self.entries.values()):
            await asyncio.sleep(0.001)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), LONG))


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.001)


def test_a_model_is_loaded_once_for_all_who_wait_and_stays() -> None:
    async def main() -> None:
        models = Models({"a": 1, "b": 1}, budget=4)
        assert models.loaded == set()
        await asyncio.gather(*(models.ask("a") for _ in range(5)), models.ask("b"))
        await models.ask("a")
        assert models.history == ["a", "b"]
        assert models.memory.used_bytes == 2 * MIB

    run(main)


def test_the_least_recently_used_model_goes() -> None:
    async def main() -> None:
        models = Models({"a": 1, "b": 1, "c": 1}, budget=2)
        for name in ("a", "b", "a", "c"):
            await models.ask(name)
            await asyncio.sleep(0.002)
        assert models.loaded == {"a", "c"}
        await models.ask("b")
        assert models.loaded == {"b", "c"}
        assert [e.num_unloads for e in models.entries.values()] == [1, 1, 0]

    run(main)


def test_no_more_goes_than_must_and_a_pinned_model_never() -> None:
    async def main() -> None:
        models = Models({"a": 2, "b": 1, "c": 1, "d": 1}, budget=4, pinned="a")
        for name in ("a", "b", "c", "d"):
            await models.ask(name)
        assert models.loaded == {"a", "c", "d"}
        with pytest.raises(RequestError, match="'a' is pinned") as refusal:
            await models.memory.unload(models.entries["a"])
        assert (refusal.value.status, refusal.value.code) == (409, "model_pinned")

    run(main)


def test_a_model_that_does_not_fit_is_refused_and_nobody_goes_for_it() -> None:
    async def main() -> None:
        models = Models({"large": 7, "a": 2, "b": 2}, budget=8, pinned="a")
        for name in ("a", "b"):
            await models.ask(name)
        with pytest.raises(ModelMemoryError) as refusal:
            await models.ask("large")
        assert refusal.value.message == (
            "the model 'large' needs 7 MiB of memory; 6 MiB of the 8 MiB of model_memory are available; "
            "pinned are a (2 MiB)"
        )
        assert refusal.value.hint == (
            "unload a (2 MiB), or start with a larger --model-memory, or with a smaller --kv-memory"
        )
        assert models.loaded == {"a", "b"}
        assert models.entries["large"].error == refusal.value.message
        await models.ask("b")

    run(main)


def test_what_the_machine_has_no_memory_for_is_refused_with_what_could_be_unloaded() -> None:
    async def main() -> None:
        models = Models({"a": 2, "b": 3}, budget=None)
        await models.ask("a")
        models.openers["b"].errors.append(MemoryLimitError("the model needs 3 MiB; 1 MiB are available"))
        with pytest.raises(ModelMemoryError, match="1 MiB are available") as refusal:
            await models.ask("b")
        assert refusal.value.hint is not None
        assert refusal.value.hint.startswith("unload a (2 MiB), or free memory")
        await models.ask("b")
        assert models.loaded == {"a", "b"}  # without a budget nobody goes

    run(main)


def test_a_busy_model_lets_requests_in_for_its_turn_and_then_those_that_run_end_first() -> None:
    async def main() -> None:
        models = Models({"a": 1, "b": 1}, budget=1, turn_seconds=0.2)
        order: list[str] = []

        async def ask(name: str, what: str, seconds: float) -> None:
            async with models.use(name):
                order.append(what)
                await asyncio.sleep(seconds)
                order.append(f"{what} ends")

        first = asyncio.create_task(ask("a", "first", 0.4))
        await until(lambda: order == ["first"])
        other = asyncio.create_task(ask("b", "other", 0.0))
        await asyncio.sleep(0.01)
        await ask("a", "within the turn", 0.0)
        assert not other.done()
        await until(lambda: models.entries["a"].state == "unloading")
        late = asyncio.create_task(ask("a", "late", 0.0))
        await asyncio.gather(first, other, late)
        assert order == [
            "first",
            "within the turn",
            "within the turn ends",
            "first ends",
            "other",
            "other ends",
            "late",
            "late ends",
        ]
        assert models.history == ["a", "b", "a"]

    run(main)


@pytest.mark.parametrize("seed", range(3))
def test_nobody_starves_whoever_keeps_asking(seed: int) -> None:
    async def main() -> None:
        models = Models({"a": 2, "b": 2, "c": 1}, budget=2, turn_seconds=0.02)
        rng = random.Random(seed)
        ended = {"a": 0, "b": 0, "c": 0}

        async def client(name: str) -> None:
            for _ in range(20):  # so many of each model that it is never idle by itself
                await models.ask(name, rng.random() / 100)
                ended[name] += 1

        await asyncio.gather(*(client(name) for name in "aaaaabbc"))
        assert ended == {"a": 100, "b": 40, "c": 20}
        assert {name: models.history.count(name) >= 1 for name in "abc"} == dict.fromkeys("abc", True)

    run(main)


def test_a_request_that_does_not_end_is_ended_when_others_have_waited_long_enough() -> None:
    async def main() -> None:
        models = Models({"a": 1, "b": 1}, budget=1, turn_seconds=0.01, drain_seconds=0.05)

        async def hang() -> None:
            async with models.use("a") as model:
                await until(lambda: model.is_closed)  # a stream ends when its model is closed

        hanging = asyncio.create_task(hang())
        await until(lambda: models.loaded == {"a"})
        await models.ask("b")
        await hanging
        assert models.loaded == {"b"}

    run(main)


def test_who_gives_up_waiting_has_nothing_loaded_and_leaves_nothing() -> None:
    async def main() -> None:
        models = Models({"a": 1, "b": 1, "c": 1}, budget=1, turn_seconds=LONG)
        async with models.use("a"):
            waiting = asyncio.create_task(models.ask("b"))
            behind = asyncio.create_task(models.ask("c"))
            await until(lambda: len(models.entries["c"].waiting) == 1)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        await behind
        await models.settle()
        assert models.history == ["a", "c"]
        assert not models.entries["b"].waiting
        assert [entry.num_uses for entry in models.entries.values()] == [0, 0, 0]

    run(main)


def test_a_load_that_fails_refuses_all_who_wait_and_is_tried_again() -> None:
    async def main() -> None:
        models = Models({"a": 1}, budget=1)
        for error, text in ((CheckpointError("torn"), "torn"), (KeyError("x"), "KeyError: 'x'")):
            models.openers["a"].errors.append(error)
            answers = await asyncio.gather(*(models.ask("a") for _ in range(3)), return_exceptions=True)
            assert {str(answer) for answer in answers} == {f"the model 'a' could not be loaded: {text}"}
            assert {getattr(answer, "status", None) for answer in answers} == {503}
            assert models.entries["a"].error == text
            assert (models.entries["a"].state, models.memory.used_bytes) == ("unloaded", 0)
        await models.ask("a")
        assert (models.entries["a"].error, models.entries["a"].num_failed_loads) == (None, 2)

    run(main)


def test_a_model_whose_load_fails_is_left_alone_for_a_while_and_pushes_nobody_out() -> None:
    async def main() -> None:
        models = Models({"a": 1, "b": 1}, budget=1, retry_seconds=LONG)
        await models.ask("b")
        models.openers["a"].errors += [CheckpointError("torn")] * 2
        for attempt in range(3):
            with pytest.raises(RequestError, match="the model 'a' could not be loaded: torn") as refused:
                await models.ask("a")
            assert ("it is tried again in 30 seconds" in str(refused.value)) == bool(attempt)
            await models.ask("b")
        assert (models.entries["a"].num_failed_loads, models.history) == (1, ["b", "b"])
        with pytest.raises(RequestError, match="torn"):  # who looks after the server need not wait
            await models.memory.load(models.entries["a"])
        await models.memory.load(models.entries["a"])
        await models.ask("a")

    run(main)


def test_what_there_was_no_memory_for_is_told_so_in_the_pause_too_and_whoever_tries_again_is_joined() -> None:
    async def main() -> None:
        models = Models({"a": 1}, budget=None, retry_seconds=LONG)
        models.openers["a"].errors.append(MemoryLimitError("it needs more than there is"))
        for _ in range(2):
            with pytest.raises(ModelMemoryError, match="could not be loaded: it needs more than there is"):
                await models.ask("a")
        models.openers["a"].gate = threading.Event()
        trying = asyncio.create_task(models.memory.load(models.entries["a"]))
        await until(lambda: models.entries["a"].state == "loading")
        asking = asyncio.create_task(models.ask("a"))
        await asyncio.sleep(0)
        models.openers["a"].gate.set()
        await asyncio.gather(trying, asking)

    run(main)


def test_so_many_wait_for_a_model_as_may() -> None:
    async def main() -> None:
        models = Models({"a": 1}, budget=1, max_waiting=2)
        models.openers["a"].gate = threading.Event()
        waiting = [asyncio.create_task(models.ask("a")) for _ in range(2)]
        await until(lambda: len(models.entries["a"].waiting) == 2)
        with pytest.raises(QueueFullError, match="2 requests wait for the model 'a'"):
            await models.ask("a")
        models.openers["a"].gate.set()
        await asyncio.gather(*waiting)

    run(main)


def test_an_unloaded_model_has_let_its_requests_end_and_comes_again_when_it_is_asked_for() -> None:
    async def main() -> None:
        models = Models({"a": 1}, budget=1)
        async with models.use("a") as model:
            unloading = [asyncio.create_task(models.memory.unload(models.entries["a"])) for _ in range(2)]
            await until(lambda: models.entries["a"].state == "unloading")
            late = asyncio.create_task(models.ask("a"))
            await asyncio.sleep(0.01)
            assert not model.is_closed
            assert not late.done()
        await asyncio.gather(*unloading, late)
        assert models.history == ["a", "a"]
        await models.memory.unload(models.entries["a"])
        await models.memory.unload(models.entries["a"])
        assert models.loaded == set()
        await models.memory.load(models.entries["a"])
        assert models.loaded == {"a"}
        assert models.entries["a"].idle_seconds is not None

    run(main)


def test_a_model_that_is_being_loaded_is_unloaded_after_those_who_waited_for_it() -> None:
    async def main() -> None:
        models = Models({"a": 1}, budget=1)
        gate = models.openers["a"].gate = threading.Event()
        asked = asyncio.create_task(models.ask("a"))
        await until(lambda: models.entries["a"].state == "loading")
        unloading = asyncio.create_task(models.memory.unload(models.entries["a"]))
        gate.set()
        await asyncio.gather(asked, unloading)
        assert models.loaded == set()

    run(main)


@pytest.mark.parametrize("state", ["unloaded", "loading", "loaded", "unloading"])
def test_a_model_that_is_not_served_any_more_goes_whatever_it_does(state: str) -> None:
    async def main() -> None:
        models = Models({"a": 3, "b": 3}, budget=4, pinned="a", turn_seconds=0.001)
        old = models.entries["a"]
        gate = models.openers["a"].gate = threading.Event()
        asked: list[asyncio.Task[None]] = []
        if state != "unloaded":
            asked.append(asyncio.create_task(models.ask("a", 0.02)))
            await until(lambda: old.state == "loading")
        if state in ("loaded", "unloading"):
            gate.set()
            await until(lambda: old.num_uses == 1)
        if state == "unloading":
            models.memory._give_up(old)
        models.memory.forget(old)
        gate.set()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(a) for a in answers] == ([ModelNotFoundError] if state == "loading" else [type(None)])[
            : len(asked)
        ]
        await models.settle()
        assert models.memory.entries == [models.entries["b"]]
        assert models.loaded == set()
        with pytest.raises(ModelNotFoundError, match="'a' is not served any more"):
            await models.memory.load(old)
        await models.ask("b")  # nobody is pinned beside it

    run(main)


def test_what_is_to_be_done_with_each_loaded_model_is_done_before_requests_are_let_in() -> None:
    async def main() -> None:
        models, seen = Models({"a": 1, "b": 1}, budget=1), []

        async def act(model: Any) -> None:
            seen.append((model.name, models.entries[model.name].num_uses))
            if len(seen) == 2:
                raise CheckpointError("not this one")

        models.memory.on_load(act)
        await models.ask("a")
        with pytest.raises(RequestError, match="not this one"):
            await models.ask("b")
        assert models.loaded == set()
        await models.ask("b")
        assert seen == [("a", 0), ("b", 0), ("b", 0)]

    run(main)


def test_the_end_refuses_who_waits_and_closes_what_is_loaded_or_being_loaded() -> None:
    async def main() -> None:
        models = Models({"a": 1, "b": 1, "c": 1}, budget=2)
        await models.ask("a")
        gate = models.openers["b"].gate = threading.Event()
        models.openers["b"].can_be_given_up = False
        waiting = [asyncio.create_task(models.ask(name)) for name in "bbc"]
        await until(lambda: models.entries["b"].state == "loading")
        closing = asyncio.create_task(models.memory.close())
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(answer) for answer in answers] == 3 * [ClosedError]
        assert models.loaded == set()
        gate.set()
        await closing
        await models.memory.close()
        assert models.loaded == set()
        with pytest.raises(ClosedError):
            await models.ask("c")

    run(main)


def test_a_load_is_given_up_when_the_server_ends_and_what_is_loaded_goes_on(caplog) -> None:
    async def main() -> None:
        models = Models({"a": 1, "b": 1, "c": 3}, budget=3)
        models.openers["b"].gate = threading.Event()  # for ever
        async with models.use("a") as model:
            waiting = [asyncio.create_task(models.ask(name)) for name in "bc"]
            await until(lambda: models.entries["b"].state == "loading")
            models.memory.stop_loading()
            answers = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(answer) for answer in answers] == 2 * [ClosedError]
            await models.settle()
            assert models.entries["b"].state == "unloaded"
            with pytest.raises(ClosedError):
                await models.ask("b")
            await models.ask("a")
            assert not model.is_closed
        await models.memory.close()
        assert (models.loaded, models.history) == (set(), ["a"])

    run(main)
    assert "could not be loaded" not in caplog.text


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_asked_given_up_loaded_and_unloaded_nothing_is_left(seed: int) -> None:
    async def main() -> None:
        rng = random.Random(seed)
        sizes = {"a": 3, "b": 2, "c": 2, "d": 1, "e": 4}
        models = Models(sizes, budget=5, pinned="d", turn_seconds=0.01, drain_seconds=0.02)
        for opener in models.openers.values():
            opener.errors += [CheckpointError("torn")] if rng.random() < 0.5 else []
        outcomes: list[object] = []

        async def client() -> None:
            name = rng.choice("abcde")
            kind = rng.random()
            try:
                if kind < 0.1:
                    await models.memory.unload(models.entries[name])
                elif kind < 0.2:
                    await models.memory.load(models.entries[name])
                elif kind < 0.4:
                    async with asyncio.timeout(rng.random() / 50):
                        await models.ask(name, rng.random() / 50)
                else:
                    async with models.use(name) as model:
                        for _ in range(rng.randrange(20)):
                            if model.is_closed:
                                break
                            await asyncio.sleep(0.001)
                outcomes.append(None)
            except (TimeoutError, RequestError) as error:
                outcomes.append(error)

        async def group() -> None:
            for _ in range(40):
                await asyncio.sleep(rng.random() / 100)
                await client()
                assert models.memory.used_bytes <= 5 * MIB

        await asyncio.gather(*(group() for _ in range(10)))
        assert len(outcomes) == 400
        assert sum(outcome is None for outcome in outcomes) > 250
        await models.settle()
        for entry in models.entries.values():
            assert (entry.num_uses, len(entry.waiting), entry.changing) == (0, 0, None)
            assert (entry.model is not None) == (entry.name in models.loaded)
            if not entry.is_pinned:
                await models.memory.unload(entry)
        assert models.loaded <= {"d"}
        assert not models.memory._wanted

    run(main)
