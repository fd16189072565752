"""The step loop: schedule, run, commit, emit. One thread at a time drives it."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import count

from fastserve.checkpoint.generation import TargetRules
from fastserve.config import MOST_TIMEOUT_MS, ScheduleOptions, check_tenant_weights
from fastserve.engine.adapter import ServedAdapter
from fastserve.engine.admission import Admission
from fastserve.engine.batch import build_batch
from fastserve.engine.beam_search import BeamSearch
from fastserve.engine.block import scope_of
from fastserve.engine.capability import Capability
from fastserve.engine.clock import SteadyClock
from fastserve.engine.completion import Chunk
from fastserve.engine.cost import StepCost
from fastserve.engine.draft_model import DraftModel
from fastserve.engine.emitter import Emitter
from fastserve.engine.encoder import build_source_batch
from fastserve.engine.guide import Guide
from fastserve.engine.mover import Mover
from fastserve.engine.policy.work import LengthPredictor
from fastserve.engine.schedule import make_scheduler
from fastserve.engine.sequence import Sequence, Source
from fastserve.engine.snapshot import EngineSnapshot, StepTotals, take_snapshot
from fastserve.engine.statistics import StepStatistics
from fastserve.engine.status import EngineStatus, take_status
from fastserve.engine.text import MakeDecoder
from fastserve.engine.turn import Turn
from fastserve.engine.turnstile import Turnstile
from fastserve.errors import DeadlineError, OptionError
from fastserve.option import check_integer, check_kind, check_number
from fastserve.types import Executable, SamplingParams, SourceExecutable, StepResult

_LONGEST_WAIT_SECONDS = 0.05  # for a move to finish, where nobody can run

logger = logging.getLogger(__name__)


class Engine:
    """Runs many sequences on one executable, batched continuously.

    A sequence's tokens do not depend on what else is in the batch, on how its prompt is cut into chunks, nor
    on whether it was preempted, moved to the slow tier, dropped and computed again, or found parts of its
    prompt in the cache of prefixes.

    Args:
        eos_token_ids: tokens that end a completion, unless its parameters ignore them.
        make_decoder: a fresh decoder for each sequence's text.
        context_length: tokens that a prompt and its completion may have together.
        options: how sequences share steps and memory.
        mover: copies blocks to and from the slow tier; None: there is none. It is the engine's from here on.
        cost: of a step, as long as none has run.
        length_predictor: tells requests of one tenant and endpoint apart whose completions differ in length,
            for policies that reckon with it.
        draft_model: guesses, where the options say so; None: they do not. It is the engine's from here on.
        target_rules: of an encoder-decoder, whose `executable` is a SourceExecutable; None: it is a decoder.
        turnstile: that engines on the same cores share; None: there are no others.
        clock: seconds. Where it jumps back, the engine's time goes on.
    """

    def __init__(
        self,
        executable: Executable,
        *,
        eos_token_ids: Seq[int],
        make_decoder: MakeDecoder,
        context_length: int,
        options: ScheduleOptions | None = None,
        mover: Mover | None = None,
        cost: StepCost | None = None,
        length_predictor: LengthPredictor | None = None,
        draft_model: DraftModel | None = None,
        target_rules: TargetRules | None = None,
        turnstile: Turnstile | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        limits = executable.limits
        options = options or ScheduleOptions()
        assert context_length <= limits.max_context
        self.scheduler = make_scheduler(
            limits,
            block_size=executable.block_size,
            options=options,
            mover=mover,
            initial_cost=cost,
            predictor=length_predictor,
            draft_model=draft_model,
            has_sources=target_rules is not None,
        )
        self.pool = self.scheduler.residency.pool
        self._admission = Admission(
            self.scheduler,
            limits,
            max_waiting=options.max_waiting,
            queue_timeout_ms=options.queue_timeout_ms,
        )
        self._options = options
        self._executable = executable
        self._mover = mover
        self._turnstile = turnstile or Turnstile()
        self._capability = Capability(
            executable.limits,
            options,
            context_length=context_length,
            kv_tokens=self.pool.num_blocks * self.pool.block_size,
            vocab_size=executable.vocab_size,
            block_size=executable.block_size,
            num_eos_tokens=len(eos_token_ids),
            target_rules=target_rules,
            source_vocab_size=executable.source_vocab_size
            if target_rules is not None and isinstance(executable, SourceExecutable)
            else None,
        )
        self._target_rules = target_rules
        self._eos_token_ids = frozenset(eos_token_ids)
        self._clock = SteadyClock(clock)
        self._ids = count()
        self._emitter = Emitter(
            self.scheduler,
            self._admission,
            eos_token_ids=eos_token_ids,
            make_decoder=make_decoder,
            next_id=self._ids,
        )
        self._is_waiting = False
        self._steps = StepStatistics.empty()
        self._totals = StepTotals()
        self._policy_spec = options.policy
        self._unix_offset: float | None = None  # of the engine's clock, once it is known

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def is_waiting(self) -> bool:
        """Whether the last step had no turns, as everybody is held or on the way."""
        return self._is_waiting

    @property
    def is_moving(self) -> bool:
        """Whether blocks are on the way to or from the slow tier."""
        return self.scheduler.residency.is_moving

    def add(
        self,
        prompt_ids: Seq[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        tenant: str = "",
        endpoint: str = "",
        priority_class: str | None = None,
        timeout_ms: float | None = None,
        session: str = "",
        arrival_seconds: float | None = None,
        guide: Guide | None = None,
        adapter: ServedAdapter | None = None,
        name: str = "",
    ) -> int:
        """Queue a request and return its request_id. What is not named here is as of `LLM.generate`.

        Args:
            timeout_ms: it is to be complete within so long of its arrival.
            arrival_seconds: when it came, by the engine's clock; None is now.
            guide: of the parameters' constraint, at its beginning; the engine's from here on.
            adapter: that is added to the model's weights for this request; the executable has slots for some.
            name: what a snapshot calls the request.

        Raises:
            OptionError: the prompt is empty, or names a token that is not in the vocabulary; more completions
                are asked for than a step has output rows; an argument is out of its range, or names a tenant
                or a class that there is not.
            ContextLengthError: the prompt, with `max_tokens`, does not fit the context.
            MemoryLimitError: it does not fit the KV memory, even alone.
            QueueFullError: as many requests wait for their first turn as may.
            DeadlineError: it cannot be complete in time.
        """
        assert (guide is None) == (params.constraint is None)
        assert adapter is None or self._executable.limits.num_adapter_slots
        check_integer("priority", priority, low=-(2**31), high=2**31)
        check_kind("session", session, str, "a name")
        check_kind("endpoint", endpoint, str, "a name")
        if timeout_ms is not None:
            check_number("timeout_ms", timeout_ms, 0, MOST_TIMEOUT_MS, is_low_open=True)
        self._capability.check_tenant(tenant)
        class_index = self._capability.class_index(priority_class)
        params = self._with_search(params)
        max_tokens = self._capability.check(prompt_ids, params)
        self._admission.check_queue()
        now = self._clock()
        arrival_seconds = now if arrival_seconds is None else min(self._clock.of(arrival_seconds), now)
        scope = b"" if self._options.share_prefixes == "all" else scope_of(tenant)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        request_id = next(self._ids)
        source, token_ids = self._begin(prompt_ids)
        search = self._make_search(params, max_tokens)
        sequences = [
            Sequence(
                sequence_id=request_id if index == 0 else next(self._ids),
                token_ids=list(token_ids),
                num_prompt_tokens=len(token_ids),
                max_tokens=max_tokens,
                source=source,
                target_rules=self._target_rules,
                num_candidates=0 if search is None else search.num_candidates + self._num_spare,
                params=params,
                seed=(seed + index) % 2**64,
                guide=guide if guide is None or index == 0 else guide.fork(),
                arrival_seconds=arrival_seconds,
                tenant=tenant,
                endpoint=endpoint,
                priority=priority,
                class_index=class_index,
                session=session,
                deadline_seconds=None if timeout_ms is None else arrival_seconds + timeout_ms / 1000,
                adapter=adapter,
                scope=scope if adapter is None else adapter.scope(scope),
            )
            for index in range(1 if search else params.n)
        ]
        sequences[0].forks = sequences[1:]
        self._take_in(request_id, sequences[0], timeout_ms, now)
        self._emitter.take_in(request_id, sequences, name=name, search=search)
        return request_id

    def _begin(self, prompt_ids: Seq[int]) -> tuple[Source | None, Seq[int]]:
        """What a sequence begins with: the prompt, or as a source, and the token that begins its target."""
        if self._target_rules is None:
            return None, prompt_ids
        num_blocks = self.pool.blocks_for(len(prompt_ids))
        source = Source(len(prompt_ids), num_blocks, num_blocks * self.pool.block_size)
        start = self._target_rules.start_token_id
        return source, [*prompt_ids, *[start] * (source.num_slots - len(prompt_ids)), start]

    @property
    def _num_spare(self) -> int:
        return self._target_rules.num_spare if self._target_rules else 0

    def _with_search(self, params: SamplingParams) -> SamplingParams:
        """With the model's own search where they leave it to the model."""
        if self._target_rules is not None:
            return self._target_rules.with_search(params)
        return replace(params, num_beams=1) if params.num_beams is None else params

    def _make_search(self, params: SamplingParams, max_tokens: int) -> BeamSearch | None:
        assert params.num_beams is not None
        if params.num_beams == 1:
            return None
        return BeamSearch(
            params.num_beams,
            eos_token_ids=self._eos_token_ids,
            max_tokens=max_tokens,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
        )

    def step(self) -> list[Chunk]:
        """Run one step and return a chunk for every token that it chose, and for every completion that
        failed. Where the time of requests is over, it ends them instead. Where nobody can run, it waits a
        while for a move to finish."""
        with self._turnstile:
            chunks = self._step()
        if self._is_waiting and not chunks:
            self.scheduler.residency.wait(_LONGEST_WAIT_SECONDS)
        return chunks

    def abort(self, request_id: int) -> float:
        """Drop a request at any moment and free what it holds. Nothing happens where it has finished.

        Returns the seconds of service that it has had and its chunks have not told.
        """
        return self._emitter.drop(request_id)

    def hold(self, request_id: int, *, is_held: bool = True) -> None:
        """Give a request no turns until it is let go again (`is_held=False`): its reader is behind."""
        self._emitter.hold(request_id, self._clock(), is_held=is_held)

    def set_policy(self, spec: str) -> None:
        """Go on by another scheduling policy.

        Raises:
            OptionError: as `fastserve.engine.policy.make_policy`.
        """
        self.scheduler.set_policy(spec, self._clock())
        self._policy_spec = spec

    def set_tenant_weights(self, weights: Mapping[str, float]) -> None:
        """Have these tenants known from now on, by these weights, besides those of the options; what each has
        been served stays as it is.

        Raises:
            OptionError: a weight is out of its range, or has no use as tenants do not share fairly.
        """
        check_tenant_weights(weights)
        if self._options.fair_share == "off" and any(weight != 1 for weight in weights.values()):
            raise OptionError(
                "weights of tenants have no use with fair_share='off'", hint="leave one of the two out"
            )
        known = {**(self._options.tenant_weights or {}), **weights}
        self._capability.set_tenants(known)
        self.scheduler.set_tenant_weights(known)

    def is_running(self, request_id: int) -> bool:
        """Whether it has completions that are not finished."""
        return self._emitter.is_running(request_id)

    def status(self) -> EngineStatus:
        """A snapshot of figures between two steps."""
        return take_status(self.scheduler, self._admission, self._steps, self._options.priority_classes)

    def snapshot(self) -> EngineSnapshot:
        """What a watcher sees, between two steps; its model has no name here."""
        now = self._clock()
        if self._unix_offset is None:
            self._unix_offset = time.time() - now
        return take_snapshot(
            self.scheduler,
            policy_spec=self._policy_spec,
            priority_classes=self._options.priority_classes,
            request_names=self._emitter.request_names,
            totals=self._totals,
            now=now,
            unix_offset=self._unix_offset,
        )

    def close(self) -> None:
        """Give up the slow tier. No step may follow."""
        if self._mover is not None:
            self._mover.close()

    def check_invariants(self) -> None:
        """Assert that every block is free or owned as the sequences say."""
        self.scheduler.check_invariants()
        waiting = [fork for s in self.scheduler.sequences for fork in s.forks]
        self._emitter.check_invariants({s.sequence_id for s in (*self.scheduler.sequences, *waiting)})

    def _step(self) -> list[Chunk]:
        started = self._clock()
        if expired := self._expire(started):
            return expired
        turns = self.scheduler.schedule(started)
        scheduled = self._clock()
        self._is_waiting = not turns
        if not turns:
            return []
        try:
            ran = self._run_or_retry(turns, scheduled)
        except MemoryError as error:
            return self._fail_largest(turns, error)
        except Exception as error:
            return self._fail_step(turns, error)
        return self._settle(*ran, started=started, scheduled=scheduled)

    def _settle(
        self, turns: list[Turn], result: StepResult, lost_seconds: float, *, started: float, scheduled: float
    ) -> list[Chunk]:
        """Commit the turns that have run, make chunks of their tokens, and count both."""
        now = self._clock()
        self._totals.count_prompts(turns)
        self.scheduler.commit(turns, seconds=now - started, now=now, lost_seconds=lost_seconds)
        chunks = self._emitter.emit(turns, result, now)
        ended = self._clock()
        self._steps.observe(
            num_sequences=len(turns),
            num_tokens=sum(turn.num_rows for turn in turns),
            schedule_seconds=scheduled - started - self.scheduler.last_guess_seconds,
            run_seconds=now - scheduled,
            emit_seconds=ended - now,
        )
        self._totals.count(chunks, seconds=ended - started)
        return chunks

    def _run_or_retry(self, turns: list[Turn], started: float) -> tuple[list[Turn], StepResult, float]:
        """Run these turns; where memory runs out, and there are drafts, without them. Those that have run,
        and seconds that say nothing of what such a step costs: of adapters that were new to it, and of the
        run that failed."""
        written_seconds = 0.0
        if self.scheduler.adapter_slots.write(self._executable):
            written_seconds = self._clock() - started
        try:
            return turns, self._run(turns), written_seconds
        except MemoryError:
            if not any(turn.drafts for turn in turns):
                raise
            logger.warning("memory ran out in a step with drafts; it runs without them")
        self.scheduler.refuse_drafts(turns)
        lost_seconds = self._clock() - started
        turns = [replace(turn, drafts=()) for turn in turns]
        return turns, self._run(turns), lost_seconds

    def _run(self, turns: Seq[Turn]) -> StepResult:
        for turn in turns:
            if turn.copy is not None:
                self._executable.copy_block(*turn.copy)
        slots = self.scheduler.adapter_slots if any(turn.sequence.adapter for turn in turns) else None
        unread = [turn.sequence for turn in turns if turn.sequence.is_source_unread]
        if unread:  # they have no output rows
            assert isinstance(self._executable, SourceExecutable)
            self._executable.encode(build_source_batch(unread, adapter_slots=slots))
            turns = [turn for turn in turns if not turn.sequence.is_source_unread]
            if not turns:
                return StepResult(outputs={})
        return self._executable.run(
            build_batch(turns, vocab_size=self._executable.vocab_size, adapter_slots=slots)
        )

    def _take_in(self, request_id: int, sequence: Sequence, timeout_ms: float | None, now: float) -> None:
        """Have the scheduler rank it. Raises DeadlineError where it cannot be complete in time."""
        self.scheduler.add(sequence, now)
        try:
            if timeout_ms is not None:
                self._admission.check_deadline(sequence, timeout_ms, now)
        except DeadlineError:
            self.scheduler.finish(sequence)
            raise
        self._admission.watch(request_id, sequence, timeout_ms, now)

    def _expire(self, now: float) -> list[Chunk]:
        """End the requests whose time is over."""
        return [
            chunk
            for request_id, reason in self._admission.expired(now)
            for chunk in self._emitter.fail(request_id, reason, now, has_expired=True)
        ]

    def _fail_step(self, turns: Seq[Turn], error: Exception) -> list[Chunk]:
        """The step that these turns make failed: their sequences end, all others go on."""
        logger.exception("a step of %d sequences failed", len(turns))
        now = self._clock()
        reason = f"its step failed: {type(error).__name__}: {error}"
        failed = [s for turn in turns for s in (turn.sequence, *turn.sequence.forks)]
        return self._emitter.fail_sequences(failed, reason, now)

    def _fail_largest(self, turns: Seq[Turn], error: MemoryError) -> list[Chunk]:
        """There was not enough memory for the step that these turns make: the request that takes most of it
        ends. The others have their turns again: nothing is committed, and what was written is written
        anew. Drafts do not count: they were left out before."""
        largest = max(reversed(turns), key=lambda turn: turn.num_tokens).sequence
        logger.exception("memory ran out in a step of %d sequences; one request ends", len(turns))
        try:
            for turn in turns:  # of blocks that are their sequences' already
                if turn.copy is not None:
                    self._executable.copy_block(*turn.copy)
        except Exception as copy_error:
            return self._fail_step(turns, copy_error)
        now = self._clock()
        reason = f"its step ran out of memory: {error}" if str(error) else "its step ran out of memory"
        return self._emitter.fail(self._emitter.request_of(largest), reason, now)
