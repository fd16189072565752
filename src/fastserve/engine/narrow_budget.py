"""How large a schema may grow while it is written without some keywords."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastserve.constraint import MAX_CONSTRAINT_CHARACTERS
from fastserve.engine.schema_keyword import Schema
from fastserve.errors import ConstraintError

_MOST_NODES = 20_000  # made of a document, kept or not, at some 3 us
_ENTRIES_PER_NODE = 8  # of a list or a mapping that is gone through: what costs as much as a node


class NarrowBudget:
    """Of a whole document. What it grows by multiplies with each level of nesting: the work ends where the
    limit is reached, not where all is built.
    """

    def __init__(self) -> None:
        self._num_nodes = 0
        self._lengths: dict[int, tuple[Schema, int]] = {}  # by identity, which holds while the schema is kept

    def spend(self, num_entries: int = 0) -> None:
        """For one node, with so many entries to go through."""
        self._num_nodes += 1 + num_entries // _ENTRIES_PER_NODE
        if self._num_nodes > _MOST_NODES:
            raise ConstraintError(
                f"the schema grows beyond {_MOST_NODES} nodes where it is written without keywords that are "
                "not supported",
                hint="nest fewer oneOf, not and if",
            )

    def check_length(self, schema: Schema) -> None:
        """Before it is written: what is built once may stand in it many times."""
        length = self._length(schema)
        if length > MAX_CONSTRAINT_CHARACTERS:
            raise ConstraintError(
                f"the schema has {length} characters where it is written without keywords that are not "
                f"supported; the limit is {MAX_CONSTRAINT_CHARACTERS}",
                hint="nest fewer oneOf, not and if",
            )

    def _length(self, value: Any) -> int:
        """Characters of JSON, at least."""
        if isinstance(value, str):
            return len(value) + 2
        if not isinstance(value, Mapping | Sequence):
            return len(repr(value))
        known = self._lengths.get(id(value))
        if known is None:
            entries = value.values() if isinstance(value, Mapping) else value
            length = sum(self._length(entry) + 2 for entry in entries)
            if isinstance(value, Mapping):
                length += sum(len(str(key)) + 4 for key in value)
            known = self._lengths[id(value)] = value, max(length, 2)
        return known[1]
