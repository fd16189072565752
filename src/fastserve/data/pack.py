"""Packing token sequences into rows of one length, so that training computes no padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from fastserve.option import check_choice, check_integer

PACKINGS = ("concatenate", "best-fit")
_WINDOW = 4096  # sequences that best-fit looks at together: bounds memory


@dataclass(slots=True)
class Pack:
    """Token ids of sequences end to end, and how many each has: attention is to stay within each."""

    input_ids: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int]) -> None:
        self.input_ids += ids
        self.lengths.append(len(ids))


def pack_sequences(
    sequences: Iterable[Sequence[int]], length: int, *, how: str = "best-fit", eos_id: int | None = None
) -> Iterator[Pack]:
    """Pack sequences into rows of at most `length` tokens, in bounded memory.

    Args:
        sequences: token ids; empty ones are left out.
        length: of a pack.
        how: `concatenate` cuts the stream of all tokens every `length`, so only the last pack is shorter;
            `best-fit` keeps sequences whole where they fit (arXiv 2404.10830), cutting those that are longer.
        eos_id: a token put behind each sequence.

    >>> [pack.lengths for pack in pack_sequences([[1] * 5, [2] * 3, [3] * 2], 5)]
    [[5], [3, 2]]

    Raises:
        OptionError: the length or the way is none.
    """
    check_integer("pack", length, low=2)
    check_choice("packing", how, PACKINGS)
    ended = ([*ids, eos_id] if eos_id is not None else list(ids) for ids in sequences if len(ids))
    return _concatenate(ended, length) if how == "concatenate" else _fit(ended, length)


def _concatenate(sequences: Iterable[list[int]], length: int) -> Iterator[Pack]:
    pack = Pack()
    for ids in sequences:
        while ids:
            room = length - len(pack.input_ids)
            pack.add(ids[:room])
            ids = ids[room:]
            if len(pack.input_ids) == length:
                yield pack
                pack = Pack()
    if pack.lengths:
        yield pack


def _fit(sequences: Iterable[list[int]], length: int) -> Iterator[Pack]:
    window: list[list[int]] = []
    for ids in sequences:
        while len(ids) > length:
            yield Pack(ids[:length], [length])
            ids = ids[length:]
        if ids:
            window.append(ids)
        if len(window) >= _WINDOW:
            yield from _fit_window(window, length)
            window = []
    yield from _fit_window(window, length)


def _fit_window(window: list[list[int]], length: int) -> Iterator[Pack]:
    """Best fit, longest first: each into the pack that it leaves least room in."""
    rooms: list[tuple[int, int]] = []  # room and index of packs, sorted
    packs: list[Pack] = []
    for ids in sorted(window, key=len, reverse=True):
        at = bisect_left(rooms, (len(ids), -1))
        if at == len(rooms):
            packs.append(Pack())
            room, index = length, len(packs) - 1
        else:
            room, index = rooms.pop(at)
        packs[index].add(ids)
        if room > len(ids):
            insort(rooms, (room - len(ids), index))
    yield from packs
