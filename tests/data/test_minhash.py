from __future__ import annotations

import numpy as np
import pytest

from fastserve.data.minhash import NUM_HASHES, band_keys, choose_bands, shingles, signature, similarity


def plain_similarity(one: str, other: str) -> float:
    """The second implementation: sets of pieces of text."""
    ones, others = ({text[at : at + 5] for at in range(max(len(text) - 4, 1))} for text in (one, other))
    return len(ones & others) / len(ones | others)


def texts(share: float, num_words: int, seed: int) -> tuple[str, str]:
    """Two texts of which about a share of the words is the same."""
    generator = np.random.default_rng(seed)
    words = [f"{number:04x}" for number in generator.integers(0, 2**16, num_words)]
    others = [word if generator.random() < share else f"{seed}z{at}" for at, word in enumerate(words)]
    return " ".join(words), " ".join(others)


@pytest.mark.parametrize(
    "pair", [("abcdef", "abcdeg"), ("a", "b"), ("今天天气很好啊", "今天天气很好吗"), ("", "a")]
)
def test_similarity_is_that_of_sets_of_pieces(pair: tuple[str, str]) -> None:
    assert similarity(*map(shingles, pair)) == pytest.approx(plain_similarity(*pair))


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_signatures_agree_as_often_as_texts_are_similar(share: float) -> None:
    errors = []
    for seed in range(40):
        one, other = texts(share, 200, seed)
        agreed = float(np.mean(signature(shingles(one)) == signature(shingles(other))))
        errors.append(agreed - similarity(shingles(one), shingles(other)))
    # The standard deviation of one is at most 0.5 / sqrt(128) = 0.044, of the mean of 40 it is 0.007.
    assert abs(float(np.mean(errors))) < 0.025
    assert float(np.std(errors)) < 0.06


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_texts_share_a_band_as_often_as_their_similarity_promises(threshold: float) -> None:
    num_bands = choose_bands(threshold)
    num_rows = NUM_HASHES // num_bands
    assert 1 - (1 - threshold**num_rows) ** num_bands >= 0.95
    found, promised = [], []
    for seed in range(300):
        one, other = (shingles(text) for text in texts(seed / 300, 60, seed))
        keys = [band_keys(signature(hashes), num_bands) for hashes in (one, other)]
        found.append(bool(np.any(keys[0] == keys[1])))
        promised.append(1 - (1 - similarity(one, other) ** num_rows) ** num_bands)
    assert abs(float(np.mean(found)) - float(np.mean(promised))) < 0.05
    sure = np.array(promised) > 0.99
    assert sure.any()
    assert np.mean(np.array(found)[sure]) > 0.95
