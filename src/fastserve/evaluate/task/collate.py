"""Examples to one rectangular batch: whole numbers [examples, longest], padded at the end."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastserve.evaluate.task.task import IGNORED, Features


def collate(features: Seq[Features], *, pad_token_id: int) -> dict[str, NDArray[Any]]:
    """A batch of the inputs of some examples, by name.

    Lists are padded to the longest: `labels` with `IGNORED`, token ids with the pad token, all else with 0.
    Of examples that hold several lists a name (choices), the batch has three axes.

    >>> collate([{"input_ids": [5, 6]}, {"input_ids": [7]}], pad_token_id=0)["input_ids"].tolist()
    [[5, 6], [7, 0]]
    """
    return {
        name: _pad([example[name] for example in features], _padding(name, pad_token_id))
        for name in features[0]
    }


def _padding(name: str, pad_token_id: int) -> int:
    if name == "labels":
        return IGNORED
    return pad_token_id if name.endswith("input_ids") else 0


def _pad(values: Seq[Any], padding: int) -> NDArray[Any]:
    if not isinstance(values[0], list):
        return np.array(values, np.float32 if isinstance(values[0], float) else np.int64)
    if values[0] and isinstance(values[0][0], list):
        most = max(map(len, values))
        length = max(len(inner) for lists in values for inner in lists)
        batch = np.full((len(values), most, length), padding, np.int64)
        for row, lists in enumerate(values):
            for column, inner in enumerate(lists):
                batch[row, column, : len(inner)] = inner
        return batch
    is_float = any(isinstance(item, float) for item in values[0])
    padded = np.full((len(values), max(map(len, values))), padding, np.float32 if is_float else np.int64)
    for row, items in enumerate(values):
        padded[row, : len(items)] = items
    return padded


def example_length(features: Mapping[str, Any]) -> int:
    """How many tokens an example has, its longest choice of several."""
    ids = features["input_ids"]
    return max(map(len, ids)) if ids and isinstance(ids[0], list) else len(ids)
