"""The step loop: schedule, run, commit, emit. One thread at a time drives it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from itertools import count

from fastserve.engine.batch import build_batch
from fastserve.engine.block import BlockPool
from fastserve.engine.completion import Chunk, TokenLogprobs
from fastserve.engine.schedule import Scheduler, Turn
from fastserve.engine.sequence import Sequence, Status
from fastserve.engine.text import CompletionText, TokenDecoder
from fastserve.errors import ContextLengthError, OptionError
from fastserve.types import Executable, SamplingParams, StepResult


class Engine:
    """Runs many sequences on one executable, batched continuously.

    A sequence's tokens do not depend on what else is in the batch, nor on how its prompt is cut into chunks.

    Args:
        eos_token_ids: tokens that end a completion, unless its parameters ignore them.
        make_decoder: a fresh decoder for each sequence's text.
        context_length: tokens that a prompt and its completion may have together.
        prefill_chunk_tokens: most tokens of one prompt in one step; None is all that the step has room for.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        executable: Executable,
        *,
        eos_token_ids: Seq[int],
        make_decoder: Callable[[], TokenDecoder],
        context_length: int,
        prefill_chunk_tokens: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        limits = executable.limits
        assert context_length <= min(limits.max_context, limits.num_blocks * executable.block_size)
        self.pool = BlockPool(num_blocks=limits.num_blocks, block_size=executable.block_size)
        self._executable = executable
        self._scheduler = Scheduler(
            self.pool, limits, prefill_chunk_tokens=prefill_chunk_tokens or limits.max_tokens
        )
        self._eos_token_ids = frozenset(eos_token_ids)
        self._make_decoder = make_decoder
        self._context_length = context_length
        self._clock = clock
        self._ids = count()
        self._sequences: dict[int, Sequence] = {}

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def add(self, prompt_ids: Seq[int], params: SamplingParams) -> int:
        """Queue a prompt and return its sequence_id.

        Raises:
            OptionError: the prompt is empty, or names a token that is not in the vocabulary.
            ContextLengthError: the prompt, with `max_tokens`, does not fit the context.
        """
        max_tokens = fit_max_tokens(len(prompt_ids), params.max_tokens, self._context_length)
        self._check_token_ids("prompt", prompt_ids)
        self._check_token_ids("logit_bias", tuple(params.logit_bias))
        sequence = Sequence(
            sequence_id=next(self._ids),
            token_ids=list(prompt_ids),
            num_prompt_tokens=len(prompt_ids),
            max_tokens=max_tokens,
            params=params,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            text=CompletionText(self._make_decoder(), params.stop, prompt_ids=prompt_ids),
            arrival_seconds=self._clock(),
        )
        self._sequences[sequence.sequence_id] = sequence
        self._scheduler.add(sequence)
        return sequence.sequence_id

    def step(self) -> list[Chunk]:
        """Run one step and return a chunk for every token that it chose. Without work, nothing happens."""
        turns = self._scheduler.schedule()
        if not turns:
            return []
        result = self._executable.run(build_batch(turns))
        grown, failed = commit(turns, result)
        return [self._emit(sequence) for sequence in grown] + [self._fail(sequence) for sequence in failed]

    def abort(self, sequence_id: int) -> None:
        """Drop a sequence at any moment and free what it holds. Nothing happens where it has finished."""
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is not None:
            self._scheduler.finish(sequence)

    def check_invariants(self) -> None:
        """Assert that every block is free or owned by exactly one running sequence."""
        self.pool.check_invariants()
        owned = [block for sequence in self._sequences.values() for block in sequence.block_table]
        assert len(set(owned)) == len(owned)
        assert len(owned) + self.pool.num_free == self.pool.num_blocks
        for sequence in self._sequences.values():
            assert bool(sequence.block_table) == (sequence.status is Status.RUNNING)

    def _emit(self, sequence: Sequence) -> Chunk:
        """The chunk of a sequence's newest token; finishes the sequence where that was its last."""
        now = self._clock()
        if sequence.first_token_seconds is None:
            sequence.first_token_seconds = now
        token_id = sequence.token_ids[-1]
        is_stop_token = self._is_stop_token(token_id, sequence.params)
        text = "" if is_stop_token else sequence.text.push(token_id)
        is_full = sequence.num_completion_tokens == sequence.max_tokens
        completion = None
        if is_stop_token or sequence.text.has_stopped or is_full:
            text += sequence.text.finish()
            is_stop = is_stop_token or sequence.text.has_stopped
            completion = sequence.complete(text, "stop" if is_stop else "length", now)
            self.abort(sequence.sequence_id)
        sequence.texts.append(text)
        return Chunk(
            sequence_id=sequence.sequence_id,
            token_id=token_id,
            text=text,
            logprobs=sequence.logprobs[-1] if sequence.logprobs else None,
            completion=completion,
        )

    def _fail(self, sequence: Sequence) -> Chunk:
        """The last chunk of a sequence whose next token cannot be chosen."""
        now = self._clock()
        if sequence.first_token_seconds is None:
            sequence.first_token_seconds = now
        text = sequence.text.finish()
        completion = sequence.complete(text, "error", now)
        self.abort(sequence.sequence_id)
        return Chunk(
            sequence_id=sequence.sequence_id, token_id=None, text=text, logprobs=None, completion=completion
        )

    def _is_stop_token(self, token_id: int, params: SamplingParams) -> bool:
        is_eos = token_id in self._eos_token_ids and not params.ignore_eos
        return is_eos or token_id in params.stop_token_ids

    def _check_token_ids(self, name: str, token_ids: Seq[int]) -> None:
        size = self._executable.vocab_size
        for token_id in token_ids:
            if not 0 <= token_id < size:
                raise OptionError(
                    f"{name} names token {token_id}, outside the model's vocabulary of {size}",
                    hint=f"token ids are 0 to {size - 1}",
                )


def commit(turns: Seq[Turn], result: StepResult) -> tuple[list[Sequence], list[Sequence]]:
    """Write a step's result into its sequences; returns those that grew by a token, in row order, and those
    for which no token could be chosen."""
    for turn in turns:
        turn.sequence.num_computed_tokens += turn.num_tokens
    grown: list[Sequence] = []
    failed: list[Sequence] = []
    assert result.token_ids is not None, "every batch of the engine asks for sampling"
    assert result.is_valid is not None
    computed = (turn.sequence for turn in turns if turn.sequence.num_uncomputed_tokens == 0)
    for row, sequence in enumerate(computed):
        if not result.is_valid[row]:
            failed.append(sequence)
            continue
        sequence.token_ids.append(int(result.token_ids[row]))
        if sequence.params.logprobs is not None:
            sequence.logprobs.append(read_logprobs(result, row, num_top=sequence.params.logprobs))
        grown.append(sequence)
    return grown, failed


def read_logprobs(result: StepResult, row: int, *, num_top: int) -> TokenLogprobs:
    """The log-probabilities of one output row."""
    assert result.token_ids is not None
    assert result.logprobs is not None
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        assert result.top_token_ids is not None
        assert result.top_logprobs is not None
        ids, logprobs = result.top_token_ids[row, :num_top], result.top_logprobs[row, :num_top]
        top = tuple(zip(ids.tolist(), logprobs.tolist(), strict=True))
    return TokenLogprobs(int(result.token_ids[row]), float(result.logprobs[row]), top)


def fit_max_tokens(num_prompt_tokens: int, max_tokens: int | None, context_length: int) -> int:
    """How long a completion may be: `max_tokens`, or up to the end of the context where it is None.

    Raises:
        OptionError: the prompt is empty.
        ContextLengthError: they do not fit the context.
    """
    if num_prompt_tokens == 0:
        raise OptionError("the prompt has no tokens", hint="give at least one character")
    if num_prompt_tokens >= context_length:
        raise ContextLengthError(
            f"the prompt has {_tokens(num_prompt_tokens)}; the context is {context_length} tokens and must "
            "hold at least one more",
            hint="shorten the prompt, or load the model with a larger context_length if it allows one",
        )
    left = context_length - num_prompt_tokens
    if max_tokens is not None and max_tokens > left:
        raise ContextLengthError(
            f"the prompt has {_tokens(num_prompt_tokens)} and max_tokens is {max_tokens}, together "
            f"{num_prompt_tokens + max_tokens}; the context is {context_length} tokens",
            hint=f"ask for max_tokens of at most {left}, or leave it out to go on until the context is full",
        )
    return left if max_tokens is None else max_tokens


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"
