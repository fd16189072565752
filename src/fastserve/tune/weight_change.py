"""What a model may compute with in place of the weights that it learns."""

from __future__ import annotations

from typing import Any, Protocol

from fastserve.types import JsonObject


class WeightChange(Protocol):
    """Has a model compute with a function of its weights, such as the numbers of a grid that are nearest.

    It is picklable, as each process of a run applies it to a model of its own.
    """

    def apply(self, model: Any) -> None:
        """Change the modules of a task's model, whose weights are the source's. Parameters and buffers that
        it adds to it are learned, kept in checkpoints and written with the model; weights keep their names.

        Raises:
            UnsupportedError: a weight is not where it was expected.
        """

    def to_json(self) -> JsonObject:
        """For the lineage. An unfinished run is gone on with where this is the same."""
