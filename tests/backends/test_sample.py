"""The sampler: native and NumPy reference go through the same tests, then are held against each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve import _native
from fastserve.backends.torch import sample as reference
from fastserve.backends.torch.sample import SampledRows, philox4x32
from fastserve.types import Float32Array, SamplingBatch, SamplingParams


@dataclass(frozen=True)
class Row:
    """What the sampler knows of one row beside its logits."""

    params: SamplingParams
    prompt: Sequence[int] = ()
    completion: Sequence[int] = ()
    draw: int = 0
    allowed: Sequence[int] | None = None  # tokens that may come; None: all


def batch_of(rows: Sequence[Row], vocab_size: int = 0) -> SamplingBatch:
    def floats(values: Sequence[float]) -> Float32Array:
        return np.array(values, np.float32)

    def ids(values: Sequence[int]) -> np.ndarray:
        return np.array(values, np.int32)

    def starts(lengths: Sequence[int]) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)

    params = [row.params for row in rows]
    masks = [mask_of(row.allowed, vocab_size) for row in rows]
    return SamplingBatch(
        temperature=floats([p.temperature for p in params]),
        top_k=ids([p.top_k for p in params]),
        top_p=floats([p.top_p for p in params]),
        min_p=floats([p.min_p for p in params]),
        presence_penalty=floats([p.presence_penalty for p in params]),
        frequency_penalty=floats([p.frequency_penalty for p in params]),
        repetition_penalty=floats([p.repetition_penalty for p in params]),
        seeds=np.array([p.seed or 0 for p in params], np.uint64),
        draws=np.array([row.draw for row in rows], np.uint64),
        num_logprobs=ids([p.logprobs or 0 for p in params]),
        history_starts=starts([len(row.prompt) + len(row.completion) for row in rows]),
        history_prompt_lengths=ids([len(row.prompt) for row in rows]),
        history_ids=ids([token_id for row in rows for token_id in (*row.prompt, *row.completion)]),
        bias_starts=starts([len(p.logit_bias) for p in params]),
        bias_ids=ids([token_id for p in params for token_id in p.logit_bias]),
        bias_values=floats([bias for p in params for bias in p.logit_bias.values()]),
        mask_starts=starts([len(mask) for mask in masks]),
        mask_words=np.concatenate(masks) if masks else np.zeros(0, np.uint32),
    )


def mask_of(allowed: Sequence[int] | None, vocab_size: int) -> np.ndarray:
    """Bit by bit, as a second implementation."""
    words = [0] * (0 if allowed is None else -(-vocab_size // 32))
    for token_id in allowed or ():
        words[token_id // 32] |= 1 << token_id % 32
    return np.array(words, np.uint32)


def sample_native(logits: Float32Array, sampling: SamplingBatch) -> SampledRows:
    is_valid, token_ids, logprobs, top_token_ids, top_logprobs = _native.sample(logits.copy(), sampling)
    return SampledRows(
        is_valid=is_valid,
        token_ids=token_ids,
        logprobs=logprobs,
        top_token_ids=top_token_ids,
        top_logprobs=top_logprobs,
    )


Sampler = Callable[[Float32Array, SamplingBatch], SampledRows]


@pytest.fixture(params=[sample_native, reference.sample], ids=["native", "reference"])
def sampler(request: pytest.FixtureRequest) -> Sampler:
    return request.param  # type: ignore[no-any-return]


def choose(sampler: Sampler, logits: Sequence[float], row: Row) -> int:
    return int(sampler(np.array([logits], np.float32), batch_of([row])).token_ids[0])


# Randomness


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (0xFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ],
)
def test_philox_gives_the_known_answers_of_random123(word: int, expected: list[int]) -> None:
    counter, key = np.full(4, word, np.uint64), np.full(2, word, np.uint64)
    assert philox4x32(counter, key).tolist() == expected


def test_philox_gives_the_known_answer_for_the_digits_of_pi() -> None:
    counter = np.array([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], np.uint64)
    key = np.array([0xA4093822, 0x299F31D0], np.uint64)
    assert philox4x32(counter, key).tolist() == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_the_known_answer_of_philox_picks_the_token(sampler: Sampler) -> None:
    # Over 4096 equal logits the token is the top 12 bits of the second word of the known answer, 0xE169C58D.
    params = SamplingParams(temperature=1.0, seed=0)
    assert choose(sampler, [0.5] * 4096, Row(params)) == 0xE16


@pytest.mark.parametrize("seed", [1, 2**32, 2**64 - 1])
@pytest.mark.parametrize("draw", [1, 2**32])
def test_seed_and_draw_count_with_all_their_bits(sampler: Sampler, seed: int, draw: int) -> None:
    key = np.array([seed % 2**32, seed >> 32], np.uint64)
    words = philox4x32(np.array([draw % 2**32, draw >> 32, 0, 0], np.uint64), key)
    params = SamplingParams(temperature=1.0, seed=seed)
    assert choose(sampler, [0.0] * 4096, Row(params, draw=draw)) == int(words[1]) >> 20


# Greedy and reported log-probabilities


def test_temperature_zero_takes_the_first_of_the_greatest(sampler: Sampler) -> None:
    assert choose(sampler, [1.0, 3.0, 2.0, 3.0], Row(SamplingParams())) == 1


def test_log_probabilities_are_those_of_the_model_whatever_shapes_the_draw(sampler: Sampler) -> None:
    logits = np.log(np.array([[0.125, 0.5, 0.25, 0.125]], np.float32)) + np.float32(3.0)
    params = SamplingParams(
        temperature=5.0, top_k=2, logit_bias={3: 50.0}, presence_penalty=1.0, logprobs=4, seed=1
    )
    result = sampler(logits, batch_of([Row(params, prompt=[1], completion=[2])]))
    assert result.token_ids[0] == 3
    assert result.logprobs[0] == pytest.approx(np.log(0.125), abs=1e-5)
    assert result.top_token_ids[0, :4].tolist() == [1, 2, 0, 3]
    np.testing.assert_allclose(np.exp(result.top_logprobs[0, :4]), [0.5, 0.25, 0.125, 0.125], rtol=1e-5)


# Penalties and biases, each on both sides of the value at which the choice turns


@pytest.mark.parametrize(("penalty", "chosen"), [(1.9, 0), (2.1, 1)])
def test_repetition_penalty_divides_positive_logits_of_the_prompt(
    sampler: Sampler, penalty: float, chosen: int
) -> None:
    row = Row(SamplingParams(repetition_penalty=penalty), prompt=[0, 0])
    assert choose(sampler, [2.0, 1.0], row) == chosen


@pytest.mark.parametrize(("penalty", "chosen"), [(1.9, 0), (2.1, 1)])
def test_repetition_penalty_multiplies_negative_logits_of_the_completion(
    sampler: Sampler, penalty: float, chosen: int
) -> None:
    row = Row(SamplingParams(repetition_penalty=penalty), completion=[0])
    assert choose(sampler, [-1.0, -2.0], row) == chosen


@pytest.mark.parametrize(("penalty", "chosen"), [(0.9, 0), (1.1, 1)])
def test_presence_penalty_is_subtracted_once(sampler: Sampler, penalty: float, chosen: int) -> None:
    row = Row(SamplingParams(presence_penalty=penalty), prompt=[1], completion=[0, 0, 0])
    assert choose(sampler, [2.0, 1.0], row) == chosen


@pytest.mark.parametrize(("penalty", "chosen"), [(0.3, 0), (0.35, 1)])
def test_frequency_penalty_is_subtracted_for_each_occurrence_in_the_completion(
    sampler: Sampler, penalty: float, chosen: int
) -> None:
    row = Row(SamplingParams(frequency_penalty=penalty), prompt=[0, 0, 0, 0], completion=[0, 0, 0])
    assert choose(sampler, [2.0, 1.0], row) == chosen


@pytest.mark.parametrize(("penalty", "chosen"), [(0.4, 0), (0.6, 1)])
def test_repetition_comes_before_the_subtracted_penalties(
    sampler: Sampler, penalty: float, chosen: int
) -> None:
    # (3 / 2) - penalty against 1; in the other order the choice would turn at a penalty of 1.
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=penalty)
    assert choose(sampler, [3.0, 1.0], Row(params, completion=[0])) == chosen


@pytest.mark.parametrize(("bias", "chosen"), [(0.9, 0), (1.1, 1)])
def test_logit_bias_is_added(sampler: Sampler, bias: float, chosen: int) -> None:
    assert choose(sampler, [2.0, 1.0], Row(SamplingParams(logit_bias={1: bias}))) == chosen


def test_penalties_of_one_row_leave_the_next_alone(sampler: Sampler) -> None:
    penalized = Row(SamplingParams(presence_penalty=2.0, frequency_penalty=2.0), completion=[0, 0])
    untouched = Row(SamplingParams(presence_penalty=2.0), completion=[1])
    logits = np.array([[2.0, 1.0], [2.0, 1.0]], np.float32)
    assert sampler(logits, batch_of([penalized, untouched])).token_ids.tolist() == [1, 0]


# Filters: drawn frequencies against distributions worked out by hand

PROBABILITIES = [0.05, 0.4, 0.1, 0.03, 0.2, 0.02, 0.15, 0.05]

# Greatest chi-square statistic to accept, by degrees of freedom, at a significance of 0.001.
CHI_SQUARE_LIMITS = {0: 0.0, 1: 10.83, 2: 13.82, 3: 16.27, 7: 24.32}


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, PROBABILITIES),
        ({"temperature": 0.5}, [p**2 for p in PROBABILITIES]),
        ({"top_k": 3}, [0, 0.4, 0, 0, 0.2, 0, 0.15, 0]),
        ({"top_k": 1}, [0, 1, 0, 0, 0, 0, 0, 0]),
        ({"top_p": 0.8}, [0, 0.4, 0.1, 0, 0.2, 0, 0.15, 0]),
        ({"top_p": 0.39}, [0, 1, 0, 0, 0, 0, 0, 0]),
        ({"min_p": 0.2}, [0, 0.4, 0.1, 0, 0.2, 0, 0.15, 0]),
        # 0.8 of the 0.85 that top-k leaves is reached by three tokens; 0.8 of everything would take four.
        ({"top_k": 4, "top_p": 0.8}, [0, 0.4, 0, 0, 0.2, 0, 0.15, 0]),
        ({"top_p": 0.8, "min_p": 0.45}, [0, 0.4, 0, 0, 0.2, 0, 0, 0]),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_the_filtered_distribution_says(
    sampler: Sampler, options: dict[str, float], weights: list[float]
) -> None:
    num_draws = 3000
    params = SamplingParams(**({"temperature": 1.0, "seed": 20} | options))  # type: ignore[arg-type]
    logits = np.tile(np.log(np.array(PROBABILITIES, np.float32)), (num_draws, 1))
    result = sampler(logits, batch_of([Row(params, draw=draw) for draw in range(num_draws)]))
    counts = Counter(result.token_ids.tolist())
    expected = {token: num_draws * w / sum(weights) for token, w in enumerate(weights) if w > 0}
    assert counts.keys() == expected.keys()
    chi_square = sum((counts[token] - count) ** 2 / count for token, count in expected.items())
    assert chi_square <= CHI_SQUARE_LIMITS[len(expected) - 1]


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.375}])
def test_a_filter_that_cuts_between_equal_logits_keeps_the_lower_ids(
    sampler: Sampler, options: dict[str, float]
) -> None:
    params = SamplingParams(temperature=1.0, seed=3, **options)  # type: ignore[arg-type]
    rows = [Row(params, draw=draw) for draw in range(64)]
    result = sampler(np.full((64, 5), -1.5, np.float32), batch_of(rows))
    assert set(result.token_ids.tolist()) == {0, 1}


# Masks


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_that_the_mask_leaves_out_is_not_chosen_however_likely(
    sampler: Sampler, temperature: float
) -> None:
    logits = np.zeros((64, 70), np.float32)
    logits[:, [0, 31, 32, 64, 69]] = 50.0
    allowed = [33, 63, 66]  # in the second and third word, beside the likely ones
    params = SamplingParams(temperature=temperature, seed=1, logit_bias={32: 100.0})
    rows = [Row(params, draw=draw, allowed=allowed) for draw in range(64)]
    chosen = set(sampler(logits, batch_of(rows, 70)).token_ids.tolist())
    assert chosen == (set(allowed) if temperature else {33})


def test_filters_see_what_the_mask_leaves(sampler: Sampler) -> None:
    logits = np.tile(np.log(np.array([0.6, 0.2, 0.1, 0.06, 0.04], np.float32)), (200, 1))
    allowed = [1, 2, 3, 4]
    for options, expected in (({"top_k": 2}, {1, 2}), ({"top_p": 0.5}, {1}), ({"min_p": 0.4}, {1, 2})):
        params = SamplingParams(temperature=1.0, seed=2, **options)  # type: ignore[arg-type]
        rows = [Row(params, draw=draw, allowed=allowed) for draw in range(200)]
        assert set(sampler(logits, batch_of(rows, 5)).token_ids.tolist()) == expected


def test_log_probabilities_do_not_know_of_the_mask(sampler: Sampler) -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25]], np.float32))
    result = sampler(logits, batch_of([Row(SamplingParams(logprobs=1), allowed=[2])], 3))
    assert (result.token_ids[0], result.top_token_ids[0, 0]) == (2, 0)
    assert result.logprobs[0] == pytest.approx(np.log(0.25), abs=1e-5)


def test_a_row_whose_mask_allows_nothing_is_not_valid_and_leaves_the_others_alone(sampler: Sampler) -> None:
    logits = np.array([[0.0, 1.0], [0.0, 1.0], [0.0, -np.inf], [5.0, 0.0]], np.float32)
    rows = [Row(SamplingParams(), allowed=allowed) for allowed in (None, [], [1], [0])]
    result = sampler(logits, batch_of(rows, 2))
    assert result.is_valid.tolist() == [True, False, False, True]
    assert result.token_ids[[0, 3]].tolist() == [1, 0]


# Logits that are not numbers


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "broken", [[np.nan, np.nan], [1.0, np.nan], [-np.inf, -np.inf], [np.inf, np.nan]], ids=str
)
def test_a_row_without_a_choice_is_not_valid_and_leaves_the_others_alone(
    sampler: Sampler, broken: list[float], temperature: float
) -> None:
    logits = np.array([[0.0, 1.0], broken, [50.0, 0.0]], np.float32)
    rows = [Row(SamplingParams(temperature=temperature, seed=1))] * 3
    result = sampler(logits, batch_of(rows))
    assert result.is_valid.tolist() == [True, False, True]
    assert result.token_ids[2] == 0


def test_infinite_logits_share_all_of_the_probability(sampler: Sampler) -> None:
    logits = np.tile(np.array([5.0, np.inf, -np.inf, np.inf], np.float32), (64, 1))
    rows = [Row(SamplingParams(temperature=1.0, seed=4, logprobs=2), draw=draw) for draw in range(64)]
    result = sampler(logits, batch_of(rows))
    assert set(result.token_ids.tolist()) == {1, 3}
    assert result.top_token_ids[0, :2].tolist() == [1, 3]
    np.testing.assert_allclose(result.logprobs, np.log(0.5), rtol=1e-6)


def test_a_temperature_close_to_zero_is_greedy(sampler: Sampler) -> None:
    params = SamplingParams(temperature=1e-30, seed=1)
    assert choose(sampler, [1.0, 3.0, 2.9], Row(params)) == 1


# Native against reference


@st.composite
def requests(draw: st.DrawFn, vocab_size: int) -> Row:
    token = st.integers(0, vocab_size - 1)
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.01, 0.7, 1.0, 3.0, 100.0])),
        top_k=draw(st.sampled_from([0, 1, 2, 3, 40, vocab_size, vocab_size + 1])),
        top_p=draw(st.sampled_from([0.001, 0.3, 0.77, 0.95, 0.99999, 1.0])),
        min_p=draw(st.sampled_from([0.0, 0.001, 0.11, 1.0])),
        presence_penalty=draw(st.sampled_from([0.0, 0.6, -1.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.3, -0.2])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.8, 1e-30])),
        logit_bias=draw(st.dictionaries(token, st.sampled_from([-100.0, 1.5, 100.0]), max_size=3)),
        seed=draw(st.integers(0, 2**64 - 1)),
        logprobs=draw(st.sampled_from([None, 0, 1, 20])),
    )
    history = st.lists(token, max_size=8)
    return Row(
        params,
        prompt=draw(history),
        completion=draw(history),
        draw=draw(st.integers(0, 2**40)),
        allowed=draw(st.none() | st.lists(token, max_size=40)),
    )


def random_logits(rng: np.random.Generator, num_rows: int, vocab_size: int) -> Float32Array:
    """Continuous or with many ties, each with some tokens forbidden; one token per row is not."""
    logits = rng.normal(0, rng.choice([0.1, 2.0, 20.0]), (num_rows, vocab_size))
    if rng.random() < 0.4:
        logits = np.round(logits)
    if rng.random() < 0.4:
        logits[rng.random(logits.shape) < 0.2] = -np.inf
        logits[:, rng.integers(vocab_size)] = 0.0
    return logits.astype(np.float32)


def assert_native_equals_reference(logits: Float32Array, rows: Sequence[Row]) -> None:
    sampling = batch_of(rows, logits.shape[1])
    native, expected = sample_native(logits, sampling), reference.sample(logits, sampling)
    np.testing.assert_array_equal(native.is_valid, expected.is_valid)
    valid_rows = expected.is_valid
    np.testing.assert_array_equal(native.token_ids[valid_rows], expected.token_ids[valid_rows])
    np.testing.assert_allclose(native.logprobs[valid_rows], expected.logprobs[valid_rows], atol=2e-5)
    for r, row in enumerate(rows):
        if not valid_rows[r]:
            continue
        valid = slice(0, min(row.params.logprobs or 0, logits.shape[1]))
        np.testing.assert_array_equal(native.top_token_ids[r, valid], expected.top_token_ids[r, valid])
        np.testing.assert_allclose(native.top_logprobs[r, valid], expected.top_logprobs[r, valid], atol=2e-5)


# Derandomized: a uniform within float32 rounding of a boundary between two tokens would be a rare miss.
@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.data(), st.sampled_from([1, 2, 15, 16, 17, 127, 128, 129, 257, 5000]), st.integers(0, 2**32))
def test_the_native_sampler_chooses_what_the_reference_chooses(
    data: st.DataObject, vocab_size: int, logits_seed: int
) -> None:
    rows = data.draw(st.lists(requests(vocab_size), min_size=1, max_size=4))
    logits = random_logits(np.random.default_rng(logits_seed), len(rows), vocab_size)
    assert_native_equals_reference(logits, rows)


@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_the_native_sampler_chooses_what_the_reference_chooses_from_a_large_vocabulary(spread: float) -> None:
    vocab_size = 151_936
    options = [{"top_p": 0.9}, {"top_k": 50}, {"top_k": 5000, "top_p": 0.5}, {"min_p": 0.05}, {}]
    rows = [
        Row(SamplingParams(temperature=1.0, seed=seed, logprobs=20, **option), draw=seed)  # type: ignore[arg-type]
        for option in options
        for seed in range(2)
    ]
    logits = np.random.default_rng(5).normal(0, spread, (len(rows), vocab_size)).astype(np.float32)
    assert_native_equals_reference(logits, rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"history_ids": [0, 4]}, "row 0 has the history id 4"),
        ({"history_ids": [0, -1]}, "row 0 has the history id -1"),
        ({"bias_ids": [4]}, "row 0 has the bias id 4"),
        ({"history_starts": [0, 3]}, "history range"),
        ({"history_starts": [2, 1]}, "history range"),
        ({"bias_starts": [0, 2]}, "bias range"),
        ({"history_prompt_lengths": [3]}, "prompt range"),
        ({"num_logprobs": [21]}, "logprobs range"),
        ({"mask_starts": [0, 2]}, "mask range"),
        ({"mask_starts": [0, 2], "mask_words": [1, 1]}, "a mask of 2 words; the vocabulary has 4 tokens"),
    ],
    ids=str,
)
def test_the_native_sampler_refuses_what_would_reach_outside_its_arrays(
    change: dict[str, list[int]], message: str
) -> None:
    sound = batch_of([Row(SamplingParams(logit_bias={1: 1.0}), prompt=[0], completion=[1])])
    broken = replace(
        sound,
        **{
            name: np.array(values, np.uint32 if name == "mask_words" else np.int32)
            for name, values in change.items()
        },
    )
    with pytest.raises(ValueError, match=message):
        sample_native(np.zeros((1, 4), np.float32), broken)
