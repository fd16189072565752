"""The order of training rows: a function of the seed and the epoch alone, so that a run that is resumed sees
the same."""

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
