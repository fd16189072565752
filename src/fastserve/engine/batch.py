"""Turns of sequences to the flat ragged batch that an executable runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastserve.engine.adapter_slots import AdapterSlots
from fastserve.engine.sequence import Sequence
from fastserve.engine.turn import Turn
from fastserve.types import Batch, Int32Array, SamplingBatch, UInt32Array

T = TypeVar("T", bound=np.generic)


def build_batch(turns: Seq[Turn], *, vocab_size: int, adapter_slots: AdapterSlots | None = None) -> Batch:
    """The batch of these turns for a model of so many logits. A turn's outputs all read the row of its last
    token; each of its drafts has a row, and an output for what follows it, behind. Without `adapter_slots`
    no adapter is used."""
    starts = [0, *accumulate(turn.num_rows for turn in turns)]
    firsts = [turn.sequence.target_start for turn in turns]
    ranges = [(t.sequence.num_computed_tokens, t.sequence.num_computed_tokens + t.num_rows) for t in turns]
    token_ids = (
        (*t.sequence.token_ids[a : a + t.num_tokens], *t.drafts)
        for t, (a, _) in zip(turns, ranges, strict=True)
    )
    outputs = [output for start, turn in zip(starts, turns, strict=False) for output in _outputs(turn, start)]
    return Batch(
        token_ids=_int32(chain.from_iterable(token_ids)),
        positions=_int32(
            position - first for first, (a, b) in zip(firsts, ranges, strict=True) for position in range(a, b)
        ),
        sequence_starts=_int32(starts),
        context_lengths=_int32(b - first for first, (_, b) in zip(firsts, ranges, strict=True)),
        block_tables=pad_block_tables([turn.sequence.target_blocks for turn in turns]),
        output_rows=_int32(row for row, _, _ in outputs),
        adapter_slots=None
        if adapter_slots is None
        else _int32(adapter_slots.slot_of(turn.sequence.adapter) for turn in turns),
        sampling=build_sampling_batch(
            [drawn for _, drawn, _ in outputs],
            drafts=[drafts for _, _, drafts in outputs],
            masks=build_masks(turns, vocab_size=vocab_size),
        ),
        **_sources(turns),
    )


class _Sources(TypedDict, total=False):
    source_lengths: Int32Array
    source_block_tables: Int32Array


def _sources(turns: Seq[Turn]) -> _Sources:
    """Of a model that has an encoder: that each sequence has one."""
    lengths = [turn.sequence.source.num_tokens for turn in turns if turn.sequence.source is not None]
    if not lengths:
        return {}
    tables = pad_block_tables([turn.sequence.source_blocks for turn in turns])
    return {"source_lengths": _int32(lengths), "source_block_tables": tables}


@dataclass(frozen=True, slots=True)
class Scored:
    """Stands for a sequence in a row whose token is known: an infinite bias makes the sampler take it, and
    tell its logprob, which biases have no part in."""

    params: ScoredParams
    seed: int = 0
    token_ids: Seq[int] = ()
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    target_start: int = 0
    target_rules: None = None
    num_candidates: int = 0
    guide: None = None


@dataclass(frozen=True, slots=True)
class ScoredParams:
    """Those of SamplingParams that the sampler reads: all are off."""

    logit_bias: Mapping[int, float]
    logprobs: int | None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0


def build_sampling_batch(
    sequences: Seq[Sequence | Scored], *, drafts: Seq[Seq[int]] | None = None, masks: UInt32Array
) -> SamplingBatch:
    """How the next token of each sequence is chosen, where that follows its tokens and the drafts that are
    named for it. `masks` [constrained ones, words] say which may be."""
    params = [sequence.params for sequence in sequences]
    drafts = drafts or [()] * len(sequences)
    histories = [
        (*s.token_ids[s.target_start :], *more) if _has_penalty(s) else ()
        for s, more in zip(sequences, drafts, strict=True)
    ]
    biases = [_biases(sequence) for sequence in sequences]
    return SamplingBatch(
        temperature=_array([p.temperature for p in params], np.float32),
        top_k=_array([p.top_k for p in params], np.int32),
        top_p=_array([p.top_p for p in params], np.float32),
        min_p=_array([p.min_p for p in params], np.float32),
        presence_penalty=_array([p.presence_penalty for p in params], np.float32),
        frequency_penalty=_array([p.frequency_penalty for p in params], np.float32),
        repetition_penalty=_array([p.repetition_penalty for p in params], np.float32),
        seeds=_array([s.seed for s in sequences], np.uint64),
        draws=_array(
            [s.num_completion_tokens + len(more) for s, more in zip(sequences, drafts, strict=True)],
            np.uint64,
        ),
        num_logprobs=_array([s.params.logprobs or s.num_candidates for s in sequences], np.int32),
        history_starts=_int32([0, *accumulate(len(ids) for ids in histories)]),
        history_prompt_lengths=_int32(
            s.num_prompt_tokens - s.target_start if _has_penalty(s) else 0 for s in sequences
        ),
        history_ids=_int32(chain.from_iterable(histories)),
        bias_starts=_int32([0, *accumulate(map(len, biases))]),
        bias_ids=_int32(chain.from_iterable(biases)),
        bias_values=_array([value for bias in biases for value in bias.values()], np.float32),
        mask_starts=_int32([0, *accumulate(masks.shape[1] * (s.guide is not None) for s in sequences)]),
        mask_words=masks.reshape(-1),
    )


def build_masks(turns: Seq[Turn], *, vocab_size: int) -> UInt32Array:
    """Which tokens may come next, for every output row of a sequence with a constraint: [such rows,
    words]."""
    guided = [turn for turn in turns if turn.sequence.guide is not None]
    num_masks = sum(len(turn.outputs) + len(turn.drafts) for turn in guided)
    masks = np.zeros((num_masks, -(-vocab_size // 32)), np.uint32)
    row = 0
    for turn in guided:
        for sequence in turn.outputs:
            assert sequence.guide is not None
            num_rows = 1 + len(turn.drafts)  # drafts have no forks beside them
            sequence.guide.fill_masks(masks[row : row + num_rows], turn.drafts)
            row += num_rows
    return masks


def _outputs(turn: Turn, start: int) -> Iterator[tuple[int, Sequence | Scored, Seq[int]]]:
    """The output rows of a turn whose first row is `start`: (row, sequence, drafts up to that row)."""
    yield from _scored_outputs(turn, start)
    last = start + turn.num_tokens - 1
    for sequence in turn.outputs:
        yield last, _forced(sequence) or sequence, ()
    for count in range(1, len(turn.drafts) + 1):
        yield last + count, turn.sequence, turn.drafts[:count]


def _forced(sequence: Sequence) -> Scored | None:
    """What stands for a sequence whose next token its model's rules name. Constraints go before them, and the
    search looks after its beams itself."""
    rules, params = sequence.target_rules, sequence.params
    if rules is None or sequence.guide is not None or sequence.num_candidates:
        return None
    token_id = rules.forced(sequence.num_completion_tokens, sequence.max_tokens)
    return None if token_id is None else Scored(ScoredParams({token_id: math.inf}, params.logprobs))


def _biases(sequence: Sequence | Scored) -> Mapping[int, float]:
    rules = sequence.target_rules
    if rules is None or not (banned := rules.banned(sequence.token_ids[sequence.target_start :])):
        return sequence.params.logit_bias
    return {**sequence.params.logit_bias, **dict.fromkeys(banned, -math.inf)}


def _scored_outputs(turn: Turn, start: int) -> Iterator[tuple[int, Scored, Seq[int]]]:
    sequence = turn.sequence
    for token_index in turn.scored_indices:
        bias = {sequence.token_ids[token_index]: math.inf}
        row = start + token_index - 1 - sequence.num_computed_tokens
        yield row, Scored(ScoredParams(bias, sequence.params.prompt_logprobs)), ()


def pad_block_tables(tables: Seq[Seq[int]]) -> Int32Array:
    """[S, blocks of the longest]; what lies beyond a sequence's own blocks is 0 and never read."""
    padded = np.zeros((len(tables), max(map(len, tables), default=0)), np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return padded


def _has_penalty(sequence: Sequence | Scored) -> bool:
    p = sequence.params
    return (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) != (0, 0, 1)


def _int32(values: Iterable[int]) -> Int32Array:
    return np.fromiter(values, np.int32)


def _array(values: Seq[float], dtype: type[T]) -> NDArray[T]:
    return np.asarray(values, dtype)
