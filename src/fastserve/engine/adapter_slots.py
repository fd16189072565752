"""Which adapters lie in the slots of an executable: as many as a step may use; others wait until one is
free."""

from __future__ import annotations

from collections.abc import Iterable

from fastserve.engine.adapter import ServedAdapter
from fastserve.engine.sequence import Residence, Sequence
from fastserve.types import NO_ADAPTER, Executable

# Where a sequence may have its next turn without being let in again.
_IN_USE = (Residence.FAST, Residence.LEAVING, Residence.ARRIVING)


class AdapterSlots:
    """Puts adapters into slots, in place of those that were used least recently and that no sequence in
    memory has.

    Whoever is the first to wait for a slot goes before others that would keep it: until it has one, nobody
    behind it is let in with an adapter. `begin` starts such a round.
    """

    def __init__(self, num_slots: int) -> None:
        self._slots: dict[ServedAdapter, int] = {}  # the least recently used first
        self._free = list(reversed(range(num_slots)))
        self._pinned: set[ServedAdapter] = set()
        self._unwritten: dict[int, ServedAdapter] = {}  # by slot
        self._somebody_waits = False

    @property
    def num_slots(self) -> int:
        return len(self._slots) + len(self._free)

    def begin(self, sequences: Iterable[Sequence]) -> None:
        """A new step is scheduled: see which adapters are in use."""
        self._pinned = {s.adapter for s in sequences if s.adapter is not None and s.residence in _IN_USE}
        self._somebody_waits = False
        assert self._pinned <= self._slots.keys()

    def has_room_for(self, adapter: ServedAdapter | None) -> bool:
        """Whether a sequence with this adapter can be let in."""
        if adapter is None:
            return True
        if self._somebody_waits:
            return False
        if adapter in self._slots or self._free or len(self._pinned) < len(self._slots):
            return True
        self._somebody_waits = True
        return False

    def use(self, adapter: ServedAdapter | None) -> None:
        """A sequence with this adapter is let in. There is room."""
        if adapter is None:
            return
        slot = self._slots.pop(adapter, None)
        if slot is None:
            slot = self._free.pop() if self._free else self._give_up()
            self._unwritten[slot] = adapter
        self._slots[adapter] = slot
        self._pinned.add(adapter)

    def write(self, executable: Executable) -> bool:
        """Put into the executable what it does not have yet; whether there was something. What fails is tried
        again the next time."""
        unwritten = list(self._unwritten.items())
        for slot, adapter in unwritten:
            executable.set_adapter(slot, adapter.matrices)
            del self._unwritten[slot]
        return bool(unwritten)

    def slot_of(self, adapter: ServedAdapter | None) -> int:
        """As `Batch.adapter_slots` has it."""
        return NO_ADAPTER if adapter is None else self._slots[adapter]

    def held_users(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """The users of one adapter, all of which are held: a slot is free when they have left. None where
        there is no such adapter."""
        users: dict[ServedAdapter, list[Sequence]] = {}
        for sequence in sequences:
            if sequence.adapter is not None and sequence.residence in _IN_USE:
                users.setdefault(sequence.adapter, []).append(sequence)
        return next(
            (own for own in users.values() if all(s.is_held and s.is_resident for s in own)),
            [],
        )

    def _give_up(self) -> int:
        idle = next(adapter for adapter in self._slots if adapter not in self._pinned)
        slot = self._slots.pop(idle)
        self._unwritten.pop(slot, None)
        return slot
