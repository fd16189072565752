"""The sampler in plain NumPy: what the native one must choose, and what the torch backend samples with.

Written for reading, not for speed: it ranks the whole vocabulary and computes probabilities in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastserve.types import MAX_TOP_LOGPROBS, BoolArray, Float32Array, Int32Array, SamplingBatch, UInt64Array

Float64Array = NDArray[np.float64]

_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledRows:
    """The choices for R rows.

    Log-probabilities are of the softmax over the logits as the model gave them: over the whole vocabulary,
    before penalties, biases and temperature (vLLM's default, `raw_logprobs`).
    """

    is_valid: BoolArray  # [R] whether a token could be chosen
    token_ids: Int32Array  # [R]
    logprobs: Float32Array  # [R] of the chosen token
    top_token_ids: Int32Array  # [R, MAX_TOP_LOGPROBS] best first, rows valid up to min(num_logprobs, vocab)
    top_logprobs: Float32Array  # [R, MAX_TOP_LOGPROBS]


def sample(logits: Float32Array, sampling: SamplingBatch) -> SampledRows:
    """Choose a token for each row of `logits` [R, vocab], which is only read.

    Order: repetition penalty, presence and frequency penalties, biases, mask, temperature, top-k, top-p over
    what top-k left, min-p relative to the most probable token; then the inverse of the cumulative
    distribution, in the order of ids, at a uniform drawn from the row's seed and draw. Equal logits
    rank by lower id; temperature 0 takes the first of the greatest. Logits of +inf share all of the
    probability among them.

    Where a row has a NaN, or nothing but -inf where its mask allows tokens, none can be chosen: it is not
    valid.
    """
    num_rows = len(logits)
    is_valid = np.zeros(num_rows, np.bool_)
    token_ids = np.zeros(num_rows, np.int32)
    logprobs = np.zeros(num_rows, np.float32)
    top_token_ids = np.zeros((num_rows, MAX_TOP_LOGPROBS), np.int32)
    top_logprobs = np.zeros((num_rows, MAX_TOP_LOGPROBS), np.float32)
    for row in range(num_rows):
        raw = _collapse_infinities(logits[row])
        is_valid[row] = not np.isnan(raw).any() and raw.max() > -np.inf
        if not is_valid[row]:
            continue
        raw_logprobs = _log_softmax(raw)
        adjusted = _collapse_infinities(_apply_penalties(raw, sampling, row))
        if sampling.mask_starts[row] < sampling.mask_starts[row + 1]:
            adjusted = _apply_mask(adjusted, sampling, row)
            is_valid[row] = adjusted.max() > -np.inf
            if not is_valid[row]:
                continue
        if sampling.temperature[row] == 0:
            token_ids[row] = adjusted.argmax()
        else:
            probabilities = _probabilities(adjusted, sampling, row)
            token_ids[row] = _draw(probabilities, uniform(sampling.seeds[row], sampling.draws[row]))
        logprobs[row] = raw_logprobs[token_ids[row]]
        top = _ranking(raw)[: sampling.num_logprobs[row]]
        top_token_ids[row, : len(top)] = top
        top_logprobs[row, : len(top)] = raw_logprobs[top]
    return SampledRows(
        is_valid=is_valid,
        token_ids=token_ids,
        logprobs=logprobs,
        top_token_ids=top_token_ids,
        top_logprobs=top_logprobs,
    )


def philox4x32(counter: UInt64Array, key: UInt64Array) -> UInt64Array:
    """Ten rounds of Philox on a counter of four 32-bit words and a key of two, all held in uint64.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, constants included.
    """
    c0, c1, c2, c3 = (int(word) for word in counter)
    k0, k1 = (int(word) for word in key)
    for _ in range(10):
        product0 = 0xD2511F53 * c0
        product1 = 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            product1 >> 32 ^ c1 ^ k0,
            product1 & _MASK32,
            product0 >> 32 ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0 = k0 + 0x9E3779B9 & _MASK32
        k1 = k1 + 0xBB67AE85 & _MASK32
    return np.array([c0, c1, c2, c3], np.uint64)


def uniform(seed: np.uint64, draw: np.uint64) -> float:
    """A number in [0, 1), of 53 bits, from the Philox block that `seed` keys and `draw` counts."""
    counter = np.array([int(draw) & _MASK32, int(draw) >> 32, 0, 0], np.uint64)
    key = np.array([int(seed) & _MASK32, int(seed) >> 32], np.uint64)
    low, high, *_ = (int(word) for word in philox4x32(counter, key))
    return float((high << 32 | low) >> 11) * 2.0**-53


def _collapse_infinities(logits: Float32Array) -> Float32Array:
    """The logits whose softmax is the limit as those of +inf grow."""
    if not (logits == np.inf).any():
        return logits
    collapsed = np.where(logits == np.inf, np.float32(0.0), np.float32(-np.inf))
    return np.where(np.isnan(logits), logits, collapsed)


def _log_softmax(logits: Float32Array) -> Float64Array:
    shifted = logits.astype(np.float64) - float(logits.max())
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def _ranking(logits: Float32Array) -> NDArray[np.intp]:
    """Token ids, highest logit first, equal ones by lower id."""
    return np.argsort(-logits, kind="stable")


def _apply_penalties(logits: Float32Array, sampling: SamplingBatch, row: int) -> Float32Array:
    """Penalties and biases, in float32 so that equal logits stay equal as they do in the native sampler."""
    adjusted = logits.copy()
    history = sampling.history_ids[sampling.history_starts[row] : sampling.history_starts[row + 1]]
    completion = history[sampling.history_prompt_lengths[row] :]

    seen = np.unique(history)
    repetition = sampling.repetition_penalty[row]
    with np.errstate(over="ignore"):
        adjusted[seen] = np.where(
            adjusted[seen] > 0, adjusted[seen] / repetition, adjusted[seen] * repetition
        )
    generated, counts = np.unique(completion, return_counts=True)
    adjusted[generated] -= sampling.frequency_penalty[row] * counts.astype(np.float32)
    adjusted[generated] -= sampling.presence_penalty[row]

    biases = slice(sampling.bias_starts[row], sampling.bias_starts[row + 1])
    np.add.at(adjusted, sampling.bias_ids[biases], sampling.bias_values[biases])
    return adjusted


def _apply_mask(logits: Float32Array, sampling: SamplingBatch, row: int) -> Float32Array:
    """-inf for the tokens that may not come."""
    words = sampling.mask_words[sampling.mask_starts[row] : sampling.mask_starts[row + 1]]
    allowed = np.unpackbits(words.astype("<u4").view(np.uint8), bitorder="little", count=len(logits))
    return np.where(allowed.astype(np.bool_), logits, np.float32(-np.inf))


def _probabilities(logits: Float32Array, sampling: SamplingBatch, row: int) -> Float64Array:
    """The distribution [vocab] that temperature and filters leave, zero where a token is filtered out."""
    shifted = logits.astype(np.float64) - float(logits.max())
    with np.errstate(over="ignore"):
        weights = np.exp(shifted / float(sampling.temperature[row]))
    ranking = _ranking(logits)
    if sampling.top_k[row] > 0:
        weights[ranking[sampling.top_k[row] :]] = 0.0
    if sampling.top_p[row] < 1:
        mass = weights[ranking].cumsum()
        last = int(np.searchsorted(mass, float(sampling.top_p[row]) * mass[-1]))
        weights[ranking[last + 1 :]] = 0.0
    weights[weights < float(sampling.min_p[row])] = 0.0  # of the most probable token's weight, which is 1
    return np.asarray(weights / weights.sum())


def _draw(probabilities: Float64Array, number: float) -> int:
    """The first token whose cumulative probability exceeds `number`; the last possible one if rounding leaves
    none."""
    exceeding = np.flatnonzero(probabilities.cumsum() > number)
    return int(exceeding[0]) if len(exceeding) else int(np.flatnonzero(probabilities)[-1])
