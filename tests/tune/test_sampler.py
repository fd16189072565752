"""How an epoch's batches are dealt out to processes."""

from __future__ import annotations

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from fastserve.tune.sampler import EpochSampler, SharedBatches


@given(
    num_rows=st.integers(1, 60),
    part_size=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    num_shares=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_processes_have_the_batches_of_one_and_no_row_twice(
    num_rows: int, part_size: int, accumulation: int, num_shares: int, seed: int
) -> None:
    size = part_size * accumulation * num_shares
    rows = EpochSampler([(7 * row) % 11 for row in range(num_rows)], batch_size=size, seed=seed)
    shares = [
        SharedBatches(
            rows,
            part_size=part_size,
            accumulation=accumulation,
            share=share,
            num_shares=num_shares,
            blank=num_rows,
        )
        for share in range(num_shares)
    ]
    parts = [list(share) for share in shares]
    order = list(rows)
    # All processes have as many parts, as many as they say, none empty and none too large.
    assert {len(own) for own in parts} == {len(shares[0])}
    assert all(1 <= len(part) <= part_size for own in parts for part in own)
    # So many parts at a time, of all processes, are a batch of the optimizer; what is left is the last one.
    for step in range(-(-num_rows // size)):
        of_step = [own[step * accumulation : (step + 1) * accumulation] for own in parts]
        seen = [row for row in chain.from_iterable(chain.from_iterable(of_step)) if row != num_rows]
        assert sorted(seen) == sorted(order[step * size : (step + 1) * size])
        assert max(map(len, of_step)) * part_size < min(size, num_rows) + part_size
