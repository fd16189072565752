"""Completions are the same with and without speculation, whatever else happens to their sequences."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_executable import FakeExecutable, LetterDecoder, NextToken, copied_token, hashed_token, letter
from fake_mover import Clock, SlowMover
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.config import ScheduleOptions
from fastserve.engine.block import prefix_key, scope_of
from fastserve.engine.completion import Completion
from fastserve.engine.cost import OnlineStepCost, StepCost, StepWork
from fastserve.engine.draft_guesser import DraftGuesser
from fastserve.engine.draft_model import DraftModel
from fastserve.engine.engine import Engine
from fastserve.engine.policy import POLICY_NAMES
from fastserve.engine.sequence import Sequence
from fastserve.engine.verification_cost import VerificationCost
from fastserve.types import Batch, Limits, SamplingParams, StepResult

DEAR = StepCost(fixed_seconds=0.001, decode_seconds=0.01, draft_seconds=0.02)
FREE = StepCost(fixed_seconds=0.01, decode_seconds=0.0, draft_seconds=0.0)
FREE_GUESSES = StepCost(fixed_seconds=0.0, prefill_seconds=0.0, decode_seconds=0.0, draft_seconds=0.0)


class FixedCost(VerificationCost):
    """It goes by what it is told, whatever the steps take."""

    def observe(self, work: StepWork, seconds: float) -> None:
        pass


class FixedStepCost(OnlineStepCost):
    """The same, of the draft model's steps."""

    def observe(self, work: StepWork, seconds: float) -> None:
        pass


class SlowExecutable(FakeExecutable):
    """Its steps take some seconds of the clock."""

    clock: Clock
    seconds: float

    def run(self, batch: Batch) -> StepResult:
        self.clock.seconds += self.seconds
        return super().run(batch)


def often_right(next_token: NextToken) -> NextToken:
    """The draft model's next token: three times of four it is that of the model."""

    def guess(context: list[int], temperature: float, seed: int, draw: int) -> int:
        token_id = next_token(context, temperature, seed, draw)
        return token_id if sum(context) % 4 else (token_id + 1) % 97

    return guess


def make(
    *,
    speculation: str = "prompt-lookup",
    next_token: NextToken = copied_token,
    num_blocks: int = 40,
    slow_blocks: int = 0,
    max_tokens: int = 24,
    max_outputs: int = 12,
    eos_token_ids: tuple[int, ...] = (),
    draft_cost: StepCost | None = FREE,
    draft_token: NextToken | None = None,
    draft_blocks: int = 40,
    draft_context: int = 64,
    guess_cost: StepCost | None = FREE_GUESSES,
    guess_seconds: float = 0.0,
    **options: object,
) -> tuple[Engine, SlowMover | None]:
    """`draft_cost` and `guess_cost` are what speculation goes by for verifying a draft, and for the steps of
    a draft model; None: what is fitted to the steps, of which one of the draft model takes `guess_seconds`
    more."""
    limits = Limits(
        max_tokens=max_tokens, max_outputs=max_outputs, max_sequences=6, num_blocks=num_blocks, max_context=64
    )
    executable = FakeExecutable(limits, block_size=4, next_token=next_token)
    mover = SlowMover(executable, slow_blocks) if slow_blocks else None
    clock = Clock()
    draft_model = None
    if speculation == "draft":
        draft_limits = replace(limits, num_blocks=draft_blocks, max_context=draft_context)
        token = draft_token or often_right(next_token)
        draft_executable = SlowExecutable(draft_limits, block_size=4, next_token=token)
        draft_executable.clock, draft_executable.seconds = clock, guess_seconds
        draft_model = DraftModel(draft_executable, clock=clock)
        if guess_cost is not None:
            draft_model.cost = FixedStepCost(guess_cost)
    engine = Engine(
        executable,
        eos_token_ids=eos_token_ids,
        make_decoder=LetterDecoder,
        context_length=64,
        options=ScheduleOptions(speculation=speculation, **options),
        mover=mover,
        draft_model=draft_model,
        clock=clock,
    )
    speculator = engine.scheduler._speculator
    if speculator is not None and draft_cost is not None:
        speculator._cost = FixedCost(OnlineStepCost(draft_cost))
    return engine, mover


def draft_model_of(engine: Engine) -> DraftModel:
    assert engine.scheduler._speculator is not None
    guesser = engine.scheduler._speculator.guesser
    assert isinstance(guesser, DraftGuesser)
    return guesser.model


def finish(engine: Engine) -> dict[tuple[int, int], Completion]:
    done = {}
    while engine.has_work:
        chunks = engine.step()
        engine.check_invariants()
        done |= {(c.request_id, c.index): c.completion for c in chunks if c.completion is not None}
    assert engine.pool.num_free == engine.pool.num_blocks
    if engine.status().speculation.guess_seconds:
        pool = draft_model_of(engine).pool
        assert pool.num_free == pool.num_blocks
    return done


def alone(prompt: list[int], params: SamplingParams, **options: object) -> Completion:
    """Without speculation, and without anybody else."""
    engine, _ = make(speculation="off", **options)
    engine.add(prompt, params)
    return finish(engine)[0, 0]


def content(completion: Completion) -> tuple[object, ...]:
    """All of it but its times and its place in its request."""
    return completion.text, completion.token_ids, completion.finish_reason, completion.logprobs


def prompt_of(length: int, *, family: int) -> list[int]:
    """Prompts of one family begin alike, and repeat themselves."""
    return [(family * 31 + position % 9) % 97 for position in range(length)]


class Bystander:
    """Keeps what sequences were there, to tell whose tokens the prefix cache holds. Looks before every step,
    for those that it finishes, and after it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sequences: dict[int, Sequence] = {}

    def look(self) -> None:
        """Every block that can be found holds committed tokens of a sequence, as its key says."""
        self._sequences |= {i: t.sequence for i, t in self._engine._emitter._transcripts.items()}
        known: dict[bytes, list[int]] = {}
        for sequence in self._sequences.values():
            key = scope_of(sequence.tenant)
            for start in range(0, len(sequence.token_ids) - 3, 4):
                tokens = sequence.token_ids[start : start + 4]
                key = prefix_key(key, tokens)
                known[key] = tokens
        executable = self._engine._executable
        assert isinstance(executable, FakeExecutable)
        for block, key in self._engine.pool._keys.items():
            assert executable._slots[block].tolist() == known[key]


samplings = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 30),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 5),
    n=st.integers(1, 3),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.sampled_from([{}, {3: 1.0}]),
    logprobs=st.sampled_from([None, 0, 2]),
    stop=st.sampled_from([(), ("ab",), ("q", "xyz")]),
    stop_token_ids=st.sampled_from([(), (5, 40)]),
    ignore_eos=st.booleans(),
)
requests = st.lists(
    st.tuples(
        st.integers(1, 34),  # prompt tokens
        st.integers(0, 2),  # family of the prompt
        st.integers(0, 25),  # step of its arrival
        st.integers(0, 2),  # priority, and tenant
        samplings,
    ),
    min_size=1,
    max_size=10,
)


@settings(deadline=None, max_examples=250)
@given(
    requests=requests,
    aborts=st.dictionaries(st.integers(0, 60), st.integers(0, 9), max_size=3),
    holds=st.dictionaries(st.integers(0, 40), st.integers(0, 9), max_size=3),
    evictions=st.sets(st.integers(0, 60), max_size=8),
    policies=st.lists(st.sampled_from(POLICY_NAMES), min_size=1, max_size=3),
    num_blocks=st.integers(16, 40),
    slow_blocks=st.sampled_from([0, 5, 40]),
    max_tokens=st.integers(6, 24),
    max_outputs=st.integers(6, 16),
    prefill_chunk_tokens=st.sampled_from([None, 1, 5]),
    max_draft_tokens=st.integers(1, 9),
    ngrams=st.sampled_from([None, None, (1, 1), (1, 3), (2, 4)]),
    draft_blocks=st.integers(3, 40),
    draft_context=st.sampled_from([20, 64]),
    prefix_cache=st.sampled_from(["lru", "off"]),
    draft_cost=st.sampled_from([FREE, None]),
)
def test_completions_are_those_without_speculation(
    requests,
    aborts,
    holds,
    evictions,
    policies,
    num_blocks,
    slow_blocks,
    max_tokens,
    max_outputs,
    prefill_chunk_tokens,
    max_draft_tokens,
    ngrams,
    draft_blocks,
    draft_context,
    prefix_cache,
    draft_cost,
) -> None:
    """By a draft model where there are no `ngrams`. The executables refuse steps of more rows or output rows
    than their limits, and check what penalties count."""
    kind: dict[str, object] = {"speculation": "draft"}
    if ngrams is not None:
        kind = {"prompt_lookup_min": ngrams[0], "prompt_lookup_max": ngrams[1]}
    engine, _ = make(
        policy=policies[0],
        num_blocks=num_blocks,
        slow_blocks=slow_blocks,
        max_tokens=max_tokens,
        max_outputs=max_outputs,
        eos_token_ids=(11,),
        prefill_chunk_tokens=prefill_chunk_tokens,
        max_draft_tokens=max_draft_tokens,
        prefix_cache=prefix_cache,
        draft_cost=draft_cost,
        draft_blocks=draft_blocks,
        draft_context=draft_context,
        guess_cost=None if draft_cost is None else FREE_GUESSES,
        **kind,
    )
    bystander = Bystander(engine)
    ids: dict[int, int] = {}  # index of a request -> request_id
    done: dict[tuple[int, int], Completion] = {}
    texts: dict[tuple[int, int], str] = {}
    for step in range(4000):
        for index, (prompt, family, arrival, priority, params) in enumerate(requests):
            if arrival == step:
                ids[index] = engine.add(
                    prompt_of(prompt, family=family), params, priority=priority, tenant=str(priority)
                )
        if aborts.get(step) in ids:
            engine.abort(ids[aborts[step]])
        if holds.get(step) in ids:
            engine.hold(ids[holds[step]])
        if step == 50:
            for request_id in ids.values():
                engine.hold(request_id, is_held=False)
        residents = [s for s in engine.scheduler.sequences if s.is_resident]
        if step in evictions and residents:
            engine.scheduler.residency.evict(residents[step % len(residents)])
        if step % 7 == 6:
            engine.set_policy(policies[step // 7 % len(policies)])
        bystander.look()
        for chunk in engine.step():
            key = chunk.request_id, chunk.index
            assert key not in done
            texts[key] = texts.get(key, "") + chunk.text
            if chunk.completion is not None:
                done[key] = chunk.completion
        engine.check_invariants()
        bystander.look()
        if step > 60 and not engine.has_work:
            break
    assert engine.pool.num_free == num_blocks
    counters = engine.status().speculation
    assert 0 <= counters.accepted_tokens <= counters.drafted_tokens
    if ngrams is None:
        assert draft_model_of(engine).pool.num_free == draft_blocks
    for index, (prompt, family, _, _, params) in enumerate(requests):
        for i in range(params.n):
            completion = done.get((ids[index], i))
            if completion is None:
                assert index in aborts.values()
                continue
            single = replace(params, n=1, seed=params.seed + i)
            expected = alone(prompt_of(prompt, family=family), single, eos_token_ids=(11,))
            assert content(completion) == content(expected)
            assert texts[ids[index], i] == expected.text


def test_drafts_that_are_right_make_fewer_steps_and_a_chunk_of_every_token() -> None:
    params = SamplingParams(max_tokens=30)
    engine, _ = make(next_token=_repeat)
    engine.add(prompt_of(7, family=1) * 3, params)
    steps = []
    while engine.has_work:
        steps.append(engine.step())
    chunks = [chunk for step in steps for chunk in step]
    assert len(chunks) == 30
    assert len(steps) < 10
    assert [chunk.completion is not None for chunk in chunks] == [False] * 29 + [True]
    assert chunks[-1].completion is not None
    assert [chunk.token_id for chunk in chunks] == list(chunks[-1].completion.token_ids)
    counters = engine.status().speculation
    assert counters.drafted_tokens == counters.accepted_tokens == 30 - len(steps)


def test_drafts_that_come_false_cost_no_token_and_no_block_of_the_prefix_cache() -> None:
    """A guess is made once some have come true: the text stops repeating itself then."""

    def turns(context: list[int], temperature: float, seed: int, draw: int) -> int:
        return context[-7] if draw < 12 else 90 - draw

    params = SamplingParams(max_tokens=24)
    prompt = prompt_of(7, family=1) * 3
    engine, _ = make(next_token=turns)
    bystander = Bystander(engine)
    engine.add(prompt, params)
    done = {}
    while engine.has_work:
        bystander.look()
        done |= {c.request_id: c.completion for c in engine.step() if c.completion is not None}
        engine.check_invariants()
        bystander.look()
    assert content(done[0]) == content(alone(prompt, params, next_token=turns))
    counters = engine.status().speculation
    assert 0 < counters.accepted_tokens < counters.drafted_tokens


def test_nothing_is_drafted_where_nothing_comes_true() -> None:
    engine, _ = make(next_token=hashed_token)
    for family in range(4):
        engine.add(prompt_of(30, family=family), SamplingParams(max_tokens=30))
    finish(engine)
    assert engine.status().speculation.drafted_tokens == 0


def test_nothing_is_drafted_where_a_row_costs_more_than_a_step() -> None:
    engine, _ = make(draft_cost=DEAR)
    for family in range(4):
        engine.add(prompt_of(30, family=family), SamplingParams(max_tokens=30))
    finish(engine)
    assert engine.status().speculation.drafted_tokens == 0


def test_the_last_token_of_a_completion_is_never_drafted() -> None:
    engine, _ = make(next_token=_repeat)
    prompt = prompt_of(7, family=1) * 3
    engine.add(prompt, SamplingParams(max_tokens=30))
    finish(engine)
    executable = engine._executable
    assert isinstance(executable, FakeExecutable)
    assert max(int(batch.context_lengths.max()) for batch in executable.batches) == len(prompt) + 29


def test_drafts_take_no_memory_from_sequences_that_wait_or_run() -> None:
    """In a pool that is full, they fit what their own blocks hold."""
    without = {}
    for speculation in ("off", "prompt-lookup"):
        engine, _ = make(speculation=speculation, num_blocks=16)
        for family in range(3):
            engine.add(prompt_of(16, family=family), SamplingParams(max_tokens=24))
        done = finish(engine)
        without.setdefault("tokens", {key: c.token_ids for key, c in done.items()})
        assert {key: c.token_ids for key, c in done.items()} == without["tokens"]
        without[speculation] = engine.scheduler.residency.counters.evictions
    assert without["prompt-lookup"] <= without["off"]


def test_a_step_is_not_made_longer_than_its_target_by_drafts() -> None:
    cost = StepCost(fixed_seconds=0.01, decode_seconds=0.0, draft_seconds=0.001)
    engine, _ = make(next_token=_repeat, draft_cost=cost, target_gap_seconds=0.0135)
    engine.add(prompt_of(7, family=1) * 3, SamplingParams(max_tokens=30))
    finish(engine)
    executable = engine._executable
    assert isinstance(executable, FakeExecutable)
    decodes = executable.batches[1:]
    assert max(batch.num_tokens for batch in decodes) == 1 + 3


def test_an_end_token_within_the_drafts_ends_the_completion() -> None:
    prompt = prompt_of(7, family=1) * 3
    plain = alone(prompt, SamplingParams(max_tokens=30), next_token=_repeat)
    eos = plain.token_ids[20]
    text = "".join(map(letter, plain.token_ids))
    for params, eos_token_ids in (
        (SamplingParams(max_tokens=30), (eos,)),
        (SamplingParams(max_tokens=30, stop_token_ids=[eos]), ()),
        (SamplingParams(max_tokens=30, stop=text[13:16]), ()),
    ):
        engine, _ = make(next_token=_repeat, eos_token_ids=eos_token_ids)
        engine.add(prompt, params)
        (completion,) = finish(engine).values()
        assert content(completion) == content(
            alone(prompt, params, next_token=_repeat, eos_token_ids=eos_token_ids)
        )


def _repeat(context: list[int], temperature: float, seed: int, draw: int) -> int:
    return context[-7]


@pytest.mark.parametrize(("max_tokens", "max_outputs"), [(7, 12), (8, 8), (24, 9)])
def test_drafts_take_the_rows_that_are_left_and_no_more(max_tokens: int, max_outputs: int) -> None:
    """The executable refuses steps beyond its limits."""
    engine, _ = make(next_token=_repeat, max_tokens=max_tokens, max_outputs=max_outputs)
    for family in range(6):
        engine.add(prompt_of(7, family=family), SamplingParams(max_tokens=40))
    finish(engine)
    executable = engine._executable
    assert isinstance(executable, FakeExecutable)
    verifying = [b for b in executable.batches if len(b.output_rows) == b.num_tokens > b.num_sequences]
    assert max(batch.num_tokens for batch in verifying) == min(max_tokens, max_outputs)


def test_a_finished_sequence_is_forgotten() -> None:
    engine, _ = make()
    request = engine.add(prompt_of(20, family=1), SamplingParams(max_tokens=20, n=2))
    for _ in range(4):
        engine.step()
    engine.abort(request)
    assert engine.scheduler._speculator is not None
    assert not engine.scheduler._speculator._accounts
    assert not engine.scheduler._speculator.guesser._texts


def test_who_chats_is_not_delayed_for_who_copies() -> None:
    """A draft that comes true nine times of ten costs a tenth of a step of four: it pays, but not for all."""

    def copies_or_not(context: list[int], temperature: float, seed: int, draw: int) -> int:
        return context[-7] if context[0] == 31 else hashed_token(context, temperature, seed, draw)

    engine, _ = make(
        next_token=copies_or_not,
        draft_cost=StepCost(fixed_seconds=0.01, decode_seconds=0, draft_seconds=0.001),
    )
    engine.add(prompt_of(7, family=1) * 3, SamplingParams(max_tokens=40))
    others = {engine.add(prompt_of(8, family=n), SamplingParams(max_tokens=16)) for n in (2, 3, 4)}
    drafted_beside_others = 0
    while engine.has_work:
        others -= {chunk.request_id for chunk in engine.step() if chunk.completion is not None}
        if others:
            drafted_beside_others = engine.status().speculation.drafted_tokens
    assert drafted_beside_others == 0
    assert engine.status().speculation.accepted_tokens > 10


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_model_of_the_same_mind_is_right_about_drawn_tokens_too(temperature: float) -> None:
    """Its draws are those of the request: another seed or index would give other tokens."""
    engine, _ = make(speculation="draft", next_token=hashed_token, draft_token=hashed_token)
    params = SamplingParams(max_tokens=30, temperature=temperature, seed=3, repetition_penalty=1.3)
    prompt = prompt_of(21, family=1)
    engine.add(prompt, params)
    (completion,) = finish(engine).values()
    assert content(completion) == content(alone(prompt, params, next_token=hashed_token))
    counters = engine.status().speculation
    assert counters.drafted_tokens == counters.accepted_tokens > 20
    executable = engine._executable
    assert isinstance(executable, FakeExecutable)
    assert len(executable.batches) == 1 + 30 - 1 - counters.accepted_tokens


def test_a_draft_model_that_is_wrong_gets_a_small_share_of_the_time() -> None:
    def wrong(context: list[int], temperature: float, seed: int, draw: int) -> int:
        return (hashed_token(context, temperature, seed, draw) + 1) % 97

    engine, _ = make(
        speculation="draft",
        next_token=hashed_token,
        draft_token=wrong,
        draft_cost=StepCost(fixed_seconds=0.01, decode_seconds=0.0, draft_seconds=0.001),
        guess_cost=None,
        guess_seconds=0.004,
    )
    for family in range(40):
        engine.add(prompt_of(20, family=family), SamplingParams(max_tokens=40))
    finish(engine)
    counters = engine.status().speculation
    assert counters.accepted_tokens == 0
    assert 0 < counters.drafted_tokens < 100
    assert isinstance(engine._executable, FakeExecutable)
    assert sum(len(batch.output_rows) for batch in engine._executable.batches) > 40 * 40


def test_a_draft_model_that_takes_what_it_saves_is_not_used() -> None:
    dear = {"guess_cost": None, "guess_seconds": 0.01}
    engine, _ = make(speculation="draft", next_token=hashed_token, draft_token=hashed_token, **dear)
    for family in range(20):
        engine.add(prompt_of(20, family=family), SamplingParams(max_tokens=40))
    finish(engine)
    assert engine.status().speculation.drafted_tokens < 40


def test_a_draft_model_keeps_nothing_of_sequences_that_were_evicted_or_aborted() -> None:
    engine, _ = make(speculation="draft", next_token=hashed_token, draft_token=hashed_token)
    ids = [engine.add(prompt_of(20, family=n), SamplingParams(max_tokens=40)) for n in range(3)]
    shadows = draft_model_of(engine)._shadows
    while set(shadows) != set(ids):
        engine.step()
    evicted = next(s for s in engine.scheduler.sequences if s.sequence_id == ids[0])
    engine.scheduler.residency.evict(evicted)
    engine.abort(ids[1])
    evicted.is_held = True
    engine.step()
    engine.check_invariants()
    assert set(shadows) == {ids[2]}
    evicted.is_held = False
    finish(engine)


def test_a_draft_model_without_room_for_all_guesses_for_some() -> None:
    """Seven blocks hold one sequence of 28 tokens, or parts of several."""
    engine, _ = make(speculation="draft", next_token=hashed_token, draft_token=hashed_token, draft_blocks=7)
    requests = [(prompt_of(8, family=n), SamplingParams(max_tokens=20)) for n in range(4)]
    for prompt, params in requests:
        engine.add(prompt, params)
    done = finish(engine)
    for (prompt, params), completion in zip(requests, (done[i, 0] for i in range(4)), strict=True):
        assert content(completion) == content(alone(prompt, params, next_token=hashed_token))
    assert engine.status().speculation.accepted_tokens > 0


def test_a_draft_model_that_fails_ends_no_request(caplog: pytest.LogCaptureFixture) -> None:
    def failing(context: list[int], temperature: float, seed: int, draw: int) -> int:
        if len(context) > 24:
            raise MemoryError
        return hashed_token(context, temperature, seed, draw)

    engine, _ = make(speculation="draft", next_token=hashed_token, draft_token=failing)
    params = SamplingParams(max_tokens=30)
    engine.add(prompt_of(10, family=1), params)
    (completion,) = finish(engine).values()
    assert content(completion) == content(alone(prompt_of(10, family=1), params, next_token=hashed_token))
    assert engine.status().speculation.accepted_tokens > 0
    assert sum("no drafts from here on" in record.message for record in caplog.records) == 1


def test_seconds_of_guesses_are_not_taken_for_those_of_steps() -> None:
    """A step takes 1 ms of the clock, one of the draft model 5."""
    engine, _ = make(
        speculation="draft",
        next_token=hashed_token,
        draft_token=hashed_token,
        draft_cost=None,
        guess_seconds=0.004,
    )
    for family in range(4):
        engine.add(prompt_of(20, family=family), SamplingParams(max_tokens=40))
    finish(engine)
    status = engine.status()
    assert status.speculation.guess_seconds > 0.01
    assert status.cost.seconds(StepWork(decode_tokens=1)) < 0.004


def test_drafts_leave_output_rows_to_prompts_that_are_scored() -> None:
    def repeat(context: list[int], *draw: float) -> int:
        return context[-7] if len(context) >= 7 else 1  # scored rows see beginnings, too

    engine, _ = make(next_token=repeat, num_blocks=80)
    stream, params = prompt_of(7, family=1) * 3, SamplingParams(max_tokens=30)
    ids = [engine.add(stream, params)]
    for _ in range(4):
        engine.step()
    scored = SamplingParams(max_tokens=2, prompt_logprobs=0)
    ids += [engine.add(prompt_of(30, family=2 + index), scored) for index in range(3)]
    done = finish(engine)
    assert [done[request_id, 0].error for request_id in ids] == [None] * 4
    assert content(done[ids[0], 0]) == content(alone(stream, params, next_token=repeat))
    assert engine.status().speculation.accepted_tokens > 0


def run_with_little_memory(engine: Engine, *, seconds: float = 0.0) -> list[int]:
    """Have steps with drafts fail, after so many seconds of the clock; other ones take 10 ms. Rows of those
    that have failed."""
    executable, clock = engine._executable, engine._clock._clock
    run, failed = executable.run, []

    def run_or_fail(batch: Batch) -> StepResult:
        has_drafts = batch.num_tokens > len(batch.sequence_starts) - 1 and batch.positions.min() > 0
        clock.seconds += seconds if has_drafts else 0.01
        if has_drafts:
            failed.append(batch.num_tokens)
            raise MemoryError("no room for activations")
        return run(batch)

    executable.run = run_or_fail
    return failed


def test_memory_that_runs_out_by_drafts_costs_the_drafts_and_nobody_a_request() -> None:
    engine, _ = make(next_token=_repeat)
    failed = run_with_little_memory(engine)
    params = SamplingParams(max_tokens=30)
    engine.add(prompt_of(7, family=1) * 3, params)
    ((_, completion),) = finish(engine).items()
    assert len(failed) == 1, "the steps after it have no drafts"
    assert completion.error is None
    assert content(completion) == content(alone(prompt_of(7, family=1) * 3, params, next_token=_repeat))


def test_drafts_come_back_some_hundred_steps_after_there_was_no_memory_for_them() -> None:
    engine, _ = make(next_token=_repeat)
    failed = run_with_little_memory(engine)
    for _ in range(20):
        engine.add(prompt_of(7, family=1) * 3, SamplingParams(max_tokens=30))
        finish(engine)
    assert 2 <= len(failed) <= 3


def test_a_run_that_failed_is_charged_to_nobody_and_says_nothing_of_what_steps_cost() -> None:
    """It takes 5 s, as long as a memory that is swapped away may; plain steps take 10 ms."""
    engine, _ = make(next_token=_repeat)
    failed = run_with_little_memory(engine, seconds=5.0)
    engine.add(prompt_of(7, family=1) * 3, SamplingParams(max_tokens=30))
    (sequence,) = engine.scheduler.sequences
    finish(engine)
    assert len(failed) == 1
    assert engine.status().cost.seconds(StepWork(decode_tokens=1)) < 0.02
    assert sequence.attained_seconds < 0.5
