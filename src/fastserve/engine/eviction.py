"""Which cached block goes first when the pool needs one."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, Protocol

EvictionName = Literal["lru", "lfu"]


class Eviction(Protocol):
    """The blocks that hold a prefix and that nobody uses."""

    def __len__(self) -> int: ...

    def add(self, block: int, num_uses: int) -> None:
        """A block that has been used so often is free for eviction from now on."""
        ...

    def remove(self, block: int) -> None:
        """Somebody uses it again."""
        ...

    def pop(self) -> int:
        """The block to give up. There is one."""
        ...


class LruEviction:
    """The block that was freed longest ago goes first."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def add(self, block: int, num_uses: int) -> None:
        self._blocks[block] = None

    def remove(self, block: int) -> None:
        del self._blocks[block]

    def pop(self) -> int:
        return self._blocks.popitem(last=False)[0]


class LfuEviction:
    """The block that was used least often goes first; of those, the one that was freed longest ago."""

    def __init__(self) -> None:
        self._by_uses: dict[int, OrderedDict[int, None]] = {}
        self._num_uses: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._num_uses)

    def add(self, block: int, num_uses: int) -> None:
        self._num_uses[block] = num_uses
        self._by_uses.setdefault(num_uses, OrderedDict())[block] = None

    def remove(self, block: int) -> None:
        num_uses = self._num_uses.pop(block)
        blocks = self._by_uses[num_uses]
        del blocks[block]
        if not blocks:
            del self._by_uses[num_uses]

    def pop(self) -> int:
        block = next(iter(self._by_uses[min(self._by_uses)]))
        self.remove(block)
        return block


def make_eviction(name: EvictionName) -> Eviction:
    return LruEviction() if name == "lru" else LfuEviction()
