"""The order of training rows: a function of the seed and the epoch alone, so that a run that is resumed sees
the same; and how processes deal them out."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq

import torch
from torch.utils.data import Sampler

_POOL_BATCHES = (
    32  # batches whose rows are sorted by length together: enough to be even, few enough to be random
)


class EpochSampler(Sampler[int]):
    """Rows at random, those of a batch of like length: padding costs as much as text.

    `epoch` is set before each epoch. Rows are shuffled, cut into pools of 32 batches, sorted by length within
    a pool, and the batches shuffled.
    """

    def __init__(self, lengths: Seq[int], *, batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        size = self._batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), size * _POOL_BATCHES):
            pool = sorted(order[start : start + size * _POOL_BATCHES], key=lambda row: self._lengths[row])
            batches += [pool[at : at + size] for at in range(0, len(pool), size)]
        # A short last batch stays last: in the middle it would shift rows across the borders of batches.
        whole = [batch for batch in batches if len(batch) == size]
        rest = [batch for batch in batches if len(batch) < size]
        for number in torch.randperm(len(whole), generator=generator).tolist():
            yield from whole[number]
        for batch in rest:
            yield from batch


class SharedBatches(Sampler[list[int]]):
    """The parts of an epoch's batches that one process computes, one after the other.

    A batch of the optimizer, of `part_size` x `accumulation` x `num_shares` rows, is cut into a share of
    neighbouring rows for each process, and that into parts. The last batch, where it is short, is shared
    alike: no row is seen twice. All processes must have as many parts: one that has no rows left has `blank`.

    >>> rows = EpochSampler([1] * 5, batch_size=4, seed=0)
    >>> whole, short = SharedBatches(rows, part_size=2, accumulation=1, share=0, num_shares=2, blank=5)
    >>> len(whole), short
    (2, [5])
    """

    def __init__(
        self,
        rows: EpochSampler,
        *,
        part_size: int,
        accumulation: int,
        share: int,
        num_shares: int,
        blank: int,
    ) -> None:
        self._rows = rows
        self._part_size = part_size
        self._batch_size = part_size * accumulation * num_shares
        self._share = share
        self._num_shares = num_shares
        self._blank = blank

    def __len__(self) -> int:
        num_whole, rest = divmod(len(self._rows), self._batch_size)
        return num_whole * self._num_parts(self._batch_size) + self._num_parts(rest)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self._rows)
        for start in range(0, len(order), self._batch_size):
            yield from self._parts(order[start : start + self._batch_size])

    def _parts(self, batch: Seq[int]) -> Iterator[list[int]]:
        first, end = (len(batch) * index // self._num_shares for index in (self._share, self._share + 1))
        own = batch[first:end]
        for index in range(self._num_parts(len(batch))):
            yield list(own[index * self._part_size : (index + 1) * self._part_size]) or [self._blank]

    def _num_parts(self, batch_size: int) -> int:
        """Of the largest share of so many rows."""
        largest = -(-batch_size // self._num_shares)
        return -(-largest // self._part_size)
