from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from fake_executable import VOCAB_SIZE, letter, make_engine, plain_loop
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.config import ScheduleOptions
from fastserve.engine.completion import Completion
from fastserve.engine.engine import Engine
from fastserve.errors import ContextLengthError, OptionError
from fastserve.types import Batch, Executable, SamplingParams, StepResult

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]


class BrokenFor:
    """An executable whose logits are not numbers for one sequence's rows, told by its first block."""

    def __init__(self, executable: Executable, block: int) -> None:
        self._executable = executable
        self._block = block

    def __getattr__(self, name: str) -> object:
        return getattr(self._executable, name)

    def run(self, batch: Batch) -> StepResult:
        result = self._executable.run(batch)
        rows = np.searchsorted(batch.sequence_starts, batch.output_rows, side="right") - 1
        return replace(result, is_valid=batch.block_tables[rows, 0] != self._block)


def run(engine: Engine, sequence_ids: Iterable[int] = ()) -> dict[int, Completion]:
    """Step until there is no work; the completions by sequence_id."""
    completions = {}
    while engine.has_work:
        for chunk in engine.step():
            engine.check_invariants()
            if chunk.completion is not None:
                completions[chunk.request_id] = chunk.completion
    assert engine.pool.num_free == engine.pool.num_blocks
    return completions


def complete(engine: Engine, params: SamplingParams, prompt: list[int] | None = None) -> Completion:
    sequence_id = engine.add(prompt or PROMPT, params)
    return run(engine)[sequence_id]


def test_a_sequence_gets_the_tokens_of_the_plain_loop() -> None:
    params = SamplingParams(max_tokens=20)
    completion = complete(make_engine(), params)
    assert list(completion.token_ids) == plain_loop(PROMPT, params, 20)
    assert completion.finish_reason == "length"
    assert completion.prompt_tokens == len(PROMPT)
    assert completion.completion_tokens == 20


@pytest.mark.parametrize("prefill_chunk_tokens", [1, 2, 3, 4, 5, 7, 8, 9, 32])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_the_prefill_chunk_size_changes_nothing(prefill_chunk_tokens: int, block_size: int) -> None:
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=7)
    engine = make_engine(prefill_chunk_tokens=prefill_chunk_tokens, block_size=block_size, num_blocks=128)
    assert list(complete(engine, params).token_ids) == plain_loop(PROMPT, params, 6)


def test_fifty_prompts_that_finish_at_different_steps_each_get_their_own_tokens() -> None:
    engine = make_engine()
    requests = {}
    for i in range(50):
        prompt = [(i * 7 + j) % VOCAB_SIZE for j in range(1 + i * 13 % 41)]
        params = SamplingParams(max_tokens=1 + i * 5 % 37, temperature=i % 2, seed=i)
        requests[engine.add(prompt, params)] = (prompt, params)
    completions = run(engine)
    assert completions.keys() == requests.keys()
    for sequence_id, (prompt, params) in requests.items():
        expected = plain_loop(prompt, params, params.max_tokens or 0)
        assert list(completions[sequence_id].token_ids) == expected


def test_running_decodes_go_on_while_a_long_prompt_is_read() -> None:
    engine = make_engine(max_tokens=8)
    short = engine.add([1], SamplingParams(max_tokens=30))
    engine.step()
    engine.add(list(range(60)), SamplingParams(max_tokens=2))
    for _ in range(8):
        assert [chunk.request_id for chunk in engine.step()] == [short]


def test_a_sequence_that_does_not_fit_waits_and_nobody_behind_it_goes_first() -> None:
    engine = make_engine(num_blocks=32, max_sequences=8, max_tokens=128)
    first = engine.add([1] * 60, SamplingParams(max_tokens=20))
    second = engine.add([2] * 80, SamplingParams(max_tokens=40))
    third = engine.add([3], SamplingParams(max_tokens=8))  # would fit beside the first
    assert list(run(engine)) == [first, third, second]
    assert engine.scheduler.num_preemptions == 0


def test_every_running_sequence_has_a_turn_in_every_step_however_few_rows_there_are() -> None:
    engine = make_engine(max_tokens=3, max_outputs=8)
    ids = {engine.add([i], SamplingParams(max_tokens=5)) for i in range(7)}
    assert len(engine.step()) == 3
    assert run(engine).keys() == ids


def test_completions_of_one_prompt_that_outnumber_the_tokens_of_a_step_take_turns() -> None:
    engine = make_engine(max_tokens=3, max_outputs=8)
    engine.add([1], SamplingParams(max_tokens=5, n=7))
    num_chunks = []
    while engine.has_work:
        num_chunks.append(len(engine.step()))
    assert num_chunks[0] == 7  # of the prompt's one row
    assert max(num_chunks[1:]) == 3  # a row each: the executable of these tests refuses more
    assert sum(num_chunks) == 35


def test_an_end_token_stops_with_its_id_kept_and_its_text_left_out() -> None:
    params = SamplingParams(max_tokens=20)
    tokens = plain_loop(PROMPT, params, 20)
    engine = make_engine(eos_token_ids=(tokens[4],))
    completion = complete(engine, params)
    assert list(completion.token_ids) == tokens[: tokens.index(tokens[4]) + 1]
    assert completion.text == "".join(map(letter, completion.token_ids[:-1]))
    assert completion.finish_reason == "stop"


def test_an_end_token_can_be_ignored_but_a_stop_token_of_the_request_cannot() -> None:
    tokens = plain_loop(PROMPT, SamplingParams(), 20)
    ends = {"eos_token_ids": (tokens[0],)}
    ignoring = complete(make_engine(**ends), SamplingParams(max_tokens=20, ignore_eos=True))
    assert list(ignoring.token_ids) == tokens
    stopping = SamplingParams(max_tokens=20, ignore_eos=True, stop_token_ids=[tokens[3]])
    assert list(complete(make_engine(**ends), stopping).token_ids) == tokens[: tokens.index(tokens[3]) + 1]


def test_a_stop_string_across_tokens_ends_the_sequence_at_once() -> None:
    tokens = plain_loop(PROMPT, SamplingParams(), 20)
    text = "".join(map(letter, tokens))
    stop = text[5:8]
    completion = complete(make_engine(), SamplingParams(max_tokens=20, stop=stop))
    end = text.index(stop)
    assert completion.text == text[:end]
    assert completion.finish_reason == "stop"
    assert completion.completion_tokens == end + 3


@pytest.mark.parametrize("stop", [(), ("q",), ("xyz", "ab")])
def test_the_chunks_texts_join_to_the_completions_text(stop: tuple[str, ...]) -> None:
    engine = make_engine()
    for i in range(6):
        engine.add([i], SamplingParams(max_tokens=40, stop=stop))
    texts: dict[int, str] = {}
    while engine.has_work:
        for chunk in engine.step():
            texts[chunk.request_id] = texts.get(chunk.request_id, "") + chunk.text
            if chunk.completion is not None:
                assert texts.pop(chunk.request_id) == chunk.completion.text
    assert not texts


def test_without_max_tokens_a_sequence_goes_on_until_the_context_is_full() -> None:
    completion = complete(make_engine(context_length=40), SamplingParams())
    assert completion.prompt_tokens + completion.completion_tokens == 40
    assert completion.finish_reason == "length"


def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers() -> None:
    with pytest.raises(ContextLengthError, match="40 tokens; the context is 40"):
        make_engine(context_length=40).add([1] * 40, SamplingParams())


def test_max_tokens_beyond_the_context_are_refused_and_the_hint_says_what_fits() -> None:
    with pytest.raises(ContextLengthError, match=r"together 41; the context is 40 .* at most 10"):
        make_engine(context_length=40).add([1] * 30, SamplingParams(max_tokens=11))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(OptionError, match="no tokens"):
        make_engine().add([], SamplingParams())


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE])
def test_token_ids_outside_the_vocabulary_are_refused(token_id: int) -> None:
    engine = make_engine()
    with pytest.raises(OptionError, match=f"prompt names token {token_id}"):
        engine.add([token_id], SamplingParams())
    with pytest.raises(OptionError, match="logit_bias"):
        engine.add([1], SamplingParams(logit_bias={token_id: 1.0}))


def test_a_fresh_seed_is_drawn_for_each_request_and_reported() -> None:
    params = SamplingParams(max_tokens=4, temperature=1.0)
    first, second = complete(make_engine(), params), complete(make_engine(), params)
    assert first.seed != second.seed
    again = complete(make_engine(), SamplingParams(max_tokens=4, temperature=1.0, seed=first.seed))
    assert again.token_ids == first.token_ids


def test_logprobs_come_with_each_token_and_only_where_asked_for() -> None:
    engine = make_engine()
    plain = engine.add([1], SamplingParams(max_tokens=3))
    wanting = engine.add([2], SamplingParams(max_tokens=3, logprobs=2))
    completions = run(engine)
    assert completions[plain].logprobs is None
    logprobs = completions[wanting].logprobs
    assert logprobs is not None
    assert [entry.token_id for entry in logprobs] == list(completions[wanting].token_ids)
    assert [entry.logprob for entry in logprobs] == [-token for token in completions[wanting].token_ids]
    assert logprobs[0].top == ((0, 0.0), (1, -1.0))


def test_times_are_measured_from_arrival_and_from_the_first_token() -> None:
    steps = [(10.25, 10.375, 10.5), (10.75, 10.875, 11.0), (11.25, 11.375, 11.5), (11.75, 11.875, 12.0)]
    seconds = iter([10.0, *(moment for step in steps for moment in (*step, step[-1] + 0.125))])
    engine = make_engine(clock=lambda: next(seconds))
    completion = complete(engine, SamplingParams(max_tokens=4))
    assert completion.queue_seconds == 0.25
    assert completion.time_to_first_token_seconds == 0.5
    assert completion.total_seconds == 2.0
    phases = engine.status().steps
    assert (phases.schedule_seconds.total, phases.run_seconds.total, phases.emit_seconds.total) == (0.5,) * 3
    assert completion.decode_tokens_per_second == 3 / 1.5


def test_a_single_token_has_no_decode_speed() -> None:
    assert complete(make_engine(), SamplingParams(max_tokens=1)).decode_tokens_per_second is None


def test_aborting_twice_or_after_the_end_does_nothing() -> None:
    engine = make_engine()
    sequence_id = engine.add(PROMPT, SamplingParams(max_tokens=4))
    engine.abort(sequence_id)
    engine.abort(sequence_id)
    assert not engine.has_work
    assert engine.step() == []


@settings(deadline=None, max_examples=60)
@given(
    requests=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(0, 30)), max_size=25),
    aborts=st.dictionaries(st.integers(0, 60), st.integers(0, 24), max_size=10),
    chunk=st.integers(1, 40),
    max_tokens=st.integers(1, 40),
    num_blocks=st.integers(32, 80),
)
def test_in_any_stream_of_requests_and_aborts_blocks_balance_and_tokens_are_those_of_the_plain_loop(
    requests, aborts, chunk, max_tokens, num_blocks
) -> None:
    engine = make_engine(prefill_chunk_tokens=chunk, max_tokens=max_tokens, num_blocks=num_blocks)
    added: dict[int, int] = {}  # sequence_id -> index of the request
    done: dict[int, Completion] = {}
    for step in range(4000):
        for index, (prompt_length, length, arrival) in enumerate(requests):
            if arrival == step:
                added[engine.add([index] * prompt_length, SamplingParams(max_tokens=length))] = index
        if aborts.get(step) in added.values():
            engine.abort(next(i for i, index in added.items() if index == aborts[step]))
        done |= {c.request_id: c.completion for c in engine.step() if c.completion is not None}
        engine.check_invariants()
        if step > 60 and not engine.has_work:
            break
    assert engine.pool.num_free == num_blocks
    assert {index for i, index in added.items() if i not in done} <= set(aborts.values())
    for sequence_id, completion in done.items():
        prompt_length, length, _ = requests[added[sequence_id]]
        expected = plain_loop([added[sequence_id]] * prompt_length, SamplingParams(), length)
        assert list(completion.token_ids) == expected


def test_a_sequence_of_which_no_token_can_be_chosen_ends_alone() -> None:
    engine = make_engine()
    params = SamplingParams(max_tokens=9)
    broken, healthy = engine.add([1, 2, 3], params), engine.add(PROMPT, params)
    engine.step()
    block = engine._emitter._transcripts[broken].sequence.block_table[0]
    engine._executable = BrokenFor(engine._executable, block)  # type: ignore[assignment]
    completions = run(engine)
    assert completions[broken].finish_reason == "error"
    assert completions[broken].completion_tokens == 1
    assert list(completions[healthy].token_ids) == plain_loop(PROMPT, params, 9)


def test_the_status_has_queue_lengths_by_class_and_level_and_what_steps_were_like() -> None:
    engine = make_engine(policy="mlfq", max_sequences=2)
    for priority_class in ("batch", "batch", "interactive"):
        engine.add(PROMPT, SamplingParams(max_tokens=4), priority_class=priority_class)
    lengths = engine.status().queue_lengths
    assert {name: sum(n for (c, _), n in lengths.items() if c == name) for name, _ in lengths} == {
        "batch": 2,
        "interactive": 1,
    }
    completions = run(engine)
    status = engine.status()
    assert status.queue_lengths == {}
    assert status.steps.num_sequences.total == 12  # turns: a prompt and three decodes each
    assert all(0 <= c.queue_seconds <= c.time_to_first_token_seconds for c in completions.values())
    assert all(c.time_to_first_token_seconds <= c.total_seconds for c in completions.values())


@pytest.mark.parametrize("num_completions", [1, 3])
def test_logprobs_of_a_prompt_come_with_its_first_token_however_it_is_cut(num_completions: int) -> None:
    prompt = [(7 * i) % VOCAB_SIZE for i in range(30)]
    params = SamplingParams(max_tokens=3, prompt_logprobs=2, n=num_completions)
    engine = make_engine(max_outputs=4, num_blocks=40, prefill_chunk_tokens=11)
    others = [engine.add(PROMPT, SamplingParams(max_tokens=20)) for _ in range(2)]
    engine.add(prompt, SamplingParams(max_tokens=1))  # leaves the prompt in the cache
    wanting = engine.add(prompt, params)
    first = None
    completions = {}
    while engine.has_work:
        for chunk in engine.step():
            engine.check_invariants()
            if chunk.request_id == wanting:
                first = first or chunk
            if chunk.completion is not None:
                completions[chunk.request_id, chunk.index] = chunk.completion
    assert first is not None
    scores = completions[wanting, 0].prompt_logprobs
    assert scores is not None
    assert first.prompt_logprobs == scores
    assert [score.token_id for score in scores] == prompt[1:]
    assert [score.logprob for score in scores] == [-token for token in prompt[1:]]
    assert all(score.top == ((0, 0.0), (1, -1.0)) for score in scores)
    expected = plain_loop(prompt, params, 3)
    assert list(completions[wanting, 0].token_ids) == expected
    assert all(len(completions[other, 0].token_ids) == 20 for other in others)
    assert completions[others[0], 0].prompt_logprobs is None


def test_a_prompt_that_is_evicted_is_scored_once() -> None:
    prompt = [(5 * i) % VOCAB_SIZE for i in range(24)]
    engine = make_engine(max_outputs=4, num_blocks=10, policy="priority")
    wanting = engine.add(prompt, SamplingParams(max_tokens=2, prompt_logprobs=0), priority=2)
    for _ in range(3):
        engine.step()
    engine.add(prompt[::-1], SamplingParams(max_tokens=8), priority=0)
    completions = run(engine)
    scores = completions[wanting].prompt_logprobs
    assert scores is not None
    assert [score.token_id for score in scores] == prompt[1:]


@pytest.mark.parametrize("num_completions", [1, 3])
@pytest.mark.parametrize("policy", ["boost", "fcfs", "sjf", "hrrn", "gittins", "mlfq"])
def test_a_prompt_is_read_alone_for_its_logprobs(policy: str, num_completions: int) -> None:
    prompt = [(7 * i) % VOCAB_SIZE for i in range(30)]
    alone = SamplingParams(max_tokens=0, prompt_logprobs=2, n=num_completions, ignore_eos=True)
    engine = make_engine(max_outputs=4, num_blocks=40, prefill_chunk_tokens=11, policy=policy)
    other = engine.add(PROMPT, SamplingParams(max_tokens=20))
    scored = engine.add(prompt, SamplingParams(max_tokens=1, prompt_logprobs=2))
    reading = engine.add(prompt, alone, timeout_ms=3_600_000)
    shortest = engine.add(prompt[:1], alone)
    chunks, completions = [], {}
    while engine.has_work:
        for chunk in engine.step():
            engine.check_invariants()
            chunks += [chunk] if chunk.request_id == reading else []
            if chunk.completion is not None:
                completions[chunk.request_id, chunk.index] = chunk.completion
    assert engine.pool.num_free == engine.pool.num_blocks
    assert [(chunk.index, chunk.token_id, chunk.text) for chunk in chunks] == [
        (index, None, "") for index in range(num_completions)
    ]
    assert chunks[0].prompt_logprobs == completions[scored, 0].prompt_logprobs
    for index in range(num_completions):
        completion = completions[reading, index].checked()
        assert (completion.finish_reason, completion.token_ids, completion.text) == ("length", (), "")
        assert completions[shortest, index].prompt_logprobs == ()
    assert list(completions[other, 0].token_ids) == plain_loop(PROMPT, SamplingParams(), 20)


def test_a_prompt_that_is_read_alone_may_fill_the_context_and_the_memory() -> None:
    engine = make_engine(num_blocks=8, block_size=4, context_length=32)
    completion = complete(engine, SamplingParams(max_tokens=0, prompt_logprobs=0), [1] * 32)
    assert completion.prompt_logprobs is not None
    assert len(completion.prompt_logprobs) == 31
    with pytest.raises(ContextLengthError, match="33 tokens; the context is 32 tokens"):
        engine.add([1] * 33, SamplingParams(max_tokens=0, prompt_logprobs=0))
    with pytest.raises(ContextLengthError, match="must hold at least one more"):
        engine.add([1] * 32, SamplingParams(prompt_logprobs=0))


def test_without_logprobs_of_the_prompt_no_tokens_are_refused_by_name() -> None:
    with pytest.raises(OptionError, match="max_tokens=0") as caught:
        SamplingParams(max_tokens=0)
    assert caught.value.option == "max_tokens"


class Ticks:
    """A clock that goes on by a second whenever it is read."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 1.0
        return self.seconds


def test_seconds_of_steps_are_shared_by_their_sequences_and_told_by_chunks() -> None:
    engine = make_engine(clock=Ticks())
    served: dict[int, float] = {}
    completions: dict[tuple[int, int], Completion] = {}
    ids = [engine.add(PROMPT, SamplingParams(max_tokens=n)) for n in (4, 9)]
    pair = engine.add(PROMPT, SamplingParams(max_tokens=6, n=2, seed=1))
    while engine.has_work:
        for chunk in engine.step():
            served[chunk.request_id] = served.get(chunk.request_id, 0.0) + chunk.service_seconds
            if chunk.completion is not None:
                completions[chunk.request_id, chunk.index] = chunk.completion
    steps = engine.status().steps
    assert sum(served.values()) == pytest.approx(steps.schedule_seconds.total + steps.run_seconds.total)
    for request_id in (*ids, pair):
        told = [c.service_seconds for (own, _), c in completions.items() if own == request_id]
        assert served[request_id] == pytest.approx(sum(told))
    assert len(completions) == 4
    assert completions[ids[1], 0].service_seconds > completions[ids[0], 0].service_seconds


@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_aborting_tells_what_no_chunk_has_told(num_steps: int) -> None:
    engine = make_engine(clock=Ticks(), prefill_chunk_tokens=2)
    request_id = engine.add(PROMPT, SamplingParams(max_tokens=50))
    (sequence,) = engine.scheduler.sequences
    told = sum(chunk.service_seconds for _ in range(num_steps) for chunk in engine.step())
    assert engine.abort(request_id) == pytest.approx(sequence.service_seconds - told)
    assert (sequence.service_seconds > told) == (num_steps == 1)  # in the midst of its prompt
    assert engine.abort(request_id) == 0.0


def test_weights_of_tenants_change_while_it_runs() -> None:
    served = dict.fromkeys("ab", 0)
    engine = make_engine(max_outputs=3, max_sequences=3, max_tokens=12)
    for weights in ({"a": 1.0, "b": 1.0}, {"a": 2.0}):
        engine.set_tenant_weights(weights)
        owners = {
            engine.add(PROMPT[:2], SamplingParams(max_tokens=100), tenant=tenant): tenant
            for tenant in "ab" * 4
        }
        for _ in range(20):
            engine.step()
        served = dict.fromkeys("ab", 0)
        for _ in range(60):
            for chunk in engine.step():
                served[owners[chunk.request_id]] += 1
        for request_id in owners:
            engine.abort(request_id)
        assert served["a"] / served["b"] == pytest.approx(weights["a"], rel=0.1)


def test_tenants_are_known_by_their_weights_beside_those_of_the_options() -> None:
    engine = make_engine(options=ScheduleOptions(tenant_weights={"own": 2.0}, unknown_tenants="refuse"))
    with pytest.raises(OptionError, match="tenant 'new' is unknown"):
        engine.add(PROMPT, SamplingParams(max_tokens=1), tenant="new")
    engine.set_tenant_weights({"new": 1.0})
    for tenant in ("own", "new"):
        engine.add(PROMPT, SamplingParams(max_tokens=1), tenant=tenant)
    engine.set_tenant_weights({})
    with pytest.raises(OptionError, match="tenant 'new' is unknown"):
        engine.add(PROMPT, SamplingParams(max_tokens=1), tenant="new")
    run(engine)


def test_weights_that_are_wrong_or_have_no_use_are_refused_and_the_old_ones_stay() -> None:
    engine = make_engine(options=ScheduleOptions(tenant_weights={"a": 2.0}, unknown_tenants="refuse"))
    with pytest.raises(OptionError, match=r"tenant_weights\['b'\]=0"):
        engine.set_tenant_weights({"b": 0})
    with pytest.raises(OptionError, match="unknown"):
        engine.add(PROMPT, SamplingParams(max_tokens=1), tenant="b")
    unfair = make_engine(options=ScheduleOptions(fair_share="off"))
    unfair.set_tenant_weights({"a": 1.0})
    with pytest.raises(OptionError, match="no use with fair_share='off'"):
        unfair.set_tenant_weights({"a": 2.0})
