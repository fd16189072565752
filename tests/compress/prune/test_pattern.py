"""Which entries go: counts, places and ties, over random scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.compress.prune.pattern import Pattern, lowest, mask_of, read_pattern
from fastserve.errors import OptionError

SEEDS = st.integers(0, 2**16)


def scores_of(seed: int, rows: int, columns: int) -> np.ndarray:
    """With many ties: few values."""
    return np.random.default_rng(seed).integers(0, 9, (rows, columns)).astype(np.float32)


@given(seed=SEEDS, rows=st.integers(1, 6), groups=st.integers(1, 6), m=st.integers(2, 8), data=st.data())
def test_n_of_m_keeps_the_n_highest_of_every_m_neighbours(
    seed: int, rows: int, groups: int, m: int, data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, m - 1))
    scores = scores_of(seed, rows, groups * m)
    mask = mask_of(scores, read_pattern(f"{n}:{m}", None), by_row=False)
    for kept, values in zip(~mask.reshape(-1, m), scores.reshape(-1, m), strict=True):
        assert kept.sum() == n
        assert values[kept].min() >= values[~kept].max()


@given(
    seed=SEEDS,
    blocks=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.sampled_from([(1, 4), (4, 1), (2, 3), (16, 1)]),
    sparsity=st.floats(0, 0.99),
    by_row=st.booleans(),
)
def test_blocks_go_whole_and_those_with_the_lowest_sums_go(
    seed: int, blocks: tuple[int, int], size: tuple[int, int], sparsity: float, by_row: bool
) -> None:
    scores = scores_of(seed, blocks[0] * size[0], blocks[1] * size[1])
    mask = mask_of(scores, Pattern(sparsity, block=size), by_row=by_row)
    parted = mask.reshape(blocks[0], size[0], blocks[1], size[1]).swapaxes(1, 2).reshape(*blocks, -1)
    assert (parted.all(axis=2) == parted.any(axis=2)).all()
    sums = scores.reshape(blocks[0], size[0], blocks[1], size[1]).sum(axis=(1, 3))
    gone = parted.all(axis=2)
    for row_gone, row_sums in zip(gone, sums, strict=True) if by_row else [(gone, sums)]:
        assert row_gone.sum() == round(sparsity * row_gone.size)
        if row_gone.any() and not row_gone.all():
            assert row_sums[row_gone].max() <= row_sums[~row_gone].min()


@given(
    seed=SEEDS,
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7)), min_size=1),
    share=st.floats(0, 1),
)
def test_the_lowest_of_several_matrices_are_those_of_a_sort_of_all_ties_included(
    seed: int, shapes: list[tuple[int, int]], share: float
) -> None:
    rng = np.random.default_rng(seed)
    matrices = [
        (rng.integers(0, 5, shape) * rng.choice([0.0, 1e-30, 0.3, 1e20])).astype(np.float32)
        for shape in shapes
    ]
    flat = np.concatenate([matrix.ravel() for matrix in matrices])
    count = round(share * flat.size)
    expected = np.zeros(flat.size, np.bool_)
    expected[np.argsort(flat, kind="stable")[:count]] = True
    choose = lowest(lambda: matrices, count)
    found = np.concatenate([choose(matrix).ravel() for matrix in matrices])
    assert (found == expected).all()


@pytest.mark.parametrize("pattern", ["2:2", "0:4", "4", "1x1", "x4", "half"])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(OptionError, match="pattern="):
        read_pattern(pattern, None)


def test_a_sparsity_that_contradicts_n_of_m_is_refused() -> None:
    assert read_pattern("2:8", 0.75).sparsity == 0.75
    with pytest.raises(OptionError, match=r"sparsity=0\.5 is not that of pattern='2:8', 0\.75"):
        read_pattern("2:8", 0.5)
