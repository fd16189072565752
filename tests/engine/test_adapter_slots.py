"""Adapters in an engine: which requests share steps, what they wait for, and what is computed with which."""

from __future__ import annotations

import pytest
from fake_executable import FakeExecutable, fake_adapter, make_engine, plain_loop

from fastserve.config import ScheduleOptions
from fastserve.engine.adapter import ServedAdapter
from fastserve.engine.completion import Completion
from fastserve.engine.engine import Engine
from fastserve.types import NO_ADAPTER, SamplingParams

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]
PARAMS = SamplingParams(max_tokens=12)
A, B, C = map(fake_adapter, (1, 2, 3))


def make(num_slots: int, **options: object) -> tuple[Engine, FakeExecutable]:
    engine = make_engine(num_adapter_slots=num_slots, options=ScheduleOptions(policy="fcfs", **options))
    executable = engine._executable
    assert isinstance(executable, FakeExecutable)
    return engine, executable


def finish(engine: Engine) -> dict[int, Completion]:
    done = {}
    for _ in range(500):
        if not engine.has_work:
            return done
        done |= {c.request_id: c.completion for c in engine.step() if c.completion is not None}
        engine.check_invariants()
    raise AssertionError("a sequence is stuck")


def expected(adapter: ServedAdapter | None) -> list[int]:
    return plain_loop(PROMPT, PARAMS, 12, rank=0 if adapter is None else adapter.rank)


def test_requests_with_and_without_adapters_share_steps_and_each_gets_its_own_tokens() -> None:
    engine, executable = make(2)
    ids = {engine.add(PROMPT, PARAMS, adapter=adapter): adapter for adapter in (A, None, B, A)}
    done = finish(engine)
    assert {id_: list(completion.token_ids) for id_, completion in done.items()} == {
        id_: expected(adapter) for id_, adapter in ids.items()
    }
    slots = next(batch for batch in executable.batches if batch.num_sequences == 4).adapter_slots
    assert slots is not None
    assert slots.tolist() == [slots[0], NO_ADAPTER, slots[2], slots[0]]
    assert executable.num_adapters_set == 2


def test_a_step_without_adapters_names_none() -> None:
    engine, executable = make(2)
    engine.add(PROMPT, PARAMS)
    finish(engine)
    assert all(batch.adapter_slots is None for batch in executable.batches)


def test_more_adapters_than_slots_take_turns_and_nobody_behind_keeps_the_first_from_its_slot() -> None:
    engine, executable = make(1)
    first = engine.add(PROMPT, SamplingParams(max_tokens=30), adapter=A)
    engine.step()
    second = engine.add(PROMPT, PARAMS, adapter=B)
    plain = engine.add(PROMPT, PARAMS)
    late = engine.add(PROMPT, PARAMS, adapter=A)  # would keep the slot for longer
    order = list(finish(engine))
    assert order == [plain, first, second, late]
    assert executable.num_adapters_set == 3


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_an_adapter_that_was_used_least_recently_gives_up_its_slot(num_slots: int) -> None:
    engine, executable = make(num_slots)
    for adapter in (A, B, A, C, A):
        engine.add(PROMPT, PARAMS, adapter=adapter)
        (completion,) = finish(engine).values()
        assert list(completion.token_ids) == expected(adapter)
    assert executable.num_adapters_set == {1: 5, 2: 3, 3: 3}[num_slots]


def test_prefixes_are_not_shared_between_adapters_but_between_requests_of_one() -> None:
    engine, _ = make(3)
    found = []
    for adapter in (None, A, B, A, None):
        engine.add(PROMPT, PARAMS, adapter=adapter)
        before = engine.scheduler.residency.counters.prefix_tokens
        finish(engine)
        found.append(engine.scheduler.residency.counters.prefix_tokens - before)
    assert found == [0, 0, 0, 8, 8]


def test_an_adapter_of_the_same_name_with_other_files_finds_nothing_of_the_old_one() -> None:
    engine, _ = make(1)
    other = ServedAdapter(A.name, A.path, b"other" * 3, fake_adapter(4).matrices)
    for adapter in (A, other):
        engine.add(PROMPT, PARAMS, adapter=adapter)
        (completion,) = finish(engine).values()
        assert list(completion.token_ids) == expected(adapter)
    assert engine.scheduler.residency.counters.prefix_tokens == 0


def test_a_request_that_is_held_does_not_keep_its_slot_from_others() -> None:
    engine, _ = make(1)
    held = engine.add(PROMPT, PARAMS, adapter=A)
    engine.step()
    engine.hold(held)
    other = engine.add(PROMPT, PARAMS, adapter=B)
    done = {}
    for _ in range(40):
        done |= {c.request_id: c.completion for c in engine.step() if c.completion is not None}
    assert list(done) == [other]
    engine.hold(held, is_held=False)
    assert list(finish(engine)[held].token_ids) == expected(A)


def test_an_adapter_that_cannot_be_put_into_its_slot_ends_the_requests_of_that_step_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, executable = make(1)
    lost = engine.add(PROMPT, PARAMS, adapter=A)
    with monkeypatch.context() as patch:
        patch.setattr(executable, "set_adapter", _fail)
        (chunk,) = engine.step()
    assert chunk.request_id == lost
    assert chunk.completion is not None
    assert "no room" in (chunk.completion.error or "")
    kept = engine.add(PROMPT, PARAMS, adapter=A)
    assert list(finish(engine)[kept].token_ids) == expected(A)


def _fail(*_: object) -> None:
    raise MemoryError("no room")
