"""A model without some of its units or layers: smaller tensors, and a config that says so."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.tensor import StoredTensor
from fastserve.compress.prune.matrix import write_matrix
from fastserve.compress.prune.structure import Part, Structure, layer_of
from fastserve.compress.step import WorkingModel
from fastserve.errors import UnsupportedError
from fastserve.types import JsonObject

Indices = NDArray[np.int64]

# Keys with an entry for each layer; and families whose layers differ by their number where a key is left out.
_PER_LAYER = ("layer_types", "no_rope_layers")
_DIFFER_BY_NUMBER = {"gemma2": "layer_types", "gemma3_text": "layer_types", "smollm3": "no_rope_layers"}


def without_units(
    model: WorkingModel, structure: Structure, kept: Mapping[str, Indices], *, are_heads: bool
) -> WorkingModel:
    """The model with some units of its parts alone, as many in each layer.

    Args:
        kept: by the name of each part's reader, the units that stay, in order.
        are_heads: whether the parts are attentions; else they are feed-forward.
    """
    parts = structure.attentions if are_heads else structure.feed_forwards
    changed: dict[str, StoredTensor] = {}
    for part in parts:
        changed |= _cut_part(model, part, kept[part.name])
    if are_heads and structure.bias is not None:
        table = model.tensors[structure.bias]
        changed[structure.bias] = write_matrix(table, to_f32(table)[:, kept[parts[0].name]])
    count = len(kept[parts[0].name])
    config = dict(model.config)
    config |= _head_config(structure, parts[0], count) if are_heads else {structure.keys.neurons: count}
    changed_model = model.with_tensors(changed)
    return replace(changed_model, checkpoint=replace(changed_model.checkpoint, config=config))


def _head_config(structure: Structure, part: Part, count: int) -> JsonObject:
    """Keys of a config whose layers have `count` heads of keys."""
    head_dim = part.makers[1][1]
    keys: JsonObject = {structure.keys.heads: count * (part.width // head_dim), "head_dim": head_dim}
    return {**keys, "num_key_value_heads": count} if structure.keys.is_decoder else keys


def _cut_part(model: WorkingModel, part: Part, kept: Indices) -> dict[str, StoredTensor]:
    changed = {}
    for linear, height in part.makers:
        rows = spread_units(kept, height)
        for parameter in (linear.weight, linear.bias):
            if parameter is not None:
                (name,) = parameter.names
                changed[name] = write_matrix(model.tensors[name], to_f32(model.tensors[name])[rows])
    reader = model.tensors[part.name]
    changed[part.name] = write_matrix(reader, to_f32(reader)[:, spread_units(kept, part.width)])
    return changed


def spread_units(units: Indices, width: int) -> Indices:
    """The rows or columns of units.

    >>> spread_units(np.asarray([0, 2]), 2).tolist()
    [0, 1, 4, 5]
    """
    spread: Indices = (units[:, None] * width + np.arange(width)).reshape(-1)
    return spread


def without_layers(model: WorkingModel, structure: Structure, gone: Collection[int]) -> WorkingModel:
    """The model without some layers; those after them are numbered anew.

    Raises:
        UnsupportedError: its layers differ by their numbers, and its config does not name their kinds.
    """
    config = dict(model.config)
    needed = _DIFFER_BY_NUMBER.get(str(config.get("model_type")))
    if config.get("use_sliding_window"):
        needed = "layer_types"
    if needed is not None and config.get(needed) is None:
        raise UnsupportedError(
            f"layers of this {config['model_type']!r} model differ by their numbers, and its config has no"
            f" {needed}",
            hint=f"save it with a newer transformers, which writes {needed}",
        )
    left = [index for index in range(structure.num_layers) if index not in gone]
    numbers = {old: new for new, old in enumerate(left)}
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in model.tensors.items():
        place = layer_of(name)
        if place is None or place[0] != structure.stem:
            tensors[name] = tensor
        elif place[1] in numbers:
            new = f"{place[0]}.{numbers[place[1]]}.{place[2]}"
            tensors[new] = StoredTensor(new, tensor.format, tensor.shape, tensor.data)
    config[structure.keys.layers] = len(left)
    for key in _PER_LAYER:
        values = config.get(key)
        if isinstance(values, list) and len(values) == structure.num_layers:
            config[key] = [values[index] for index in left]
    return replace(model, checkpoint=replace(model.checkpoint, config=config, tensors=tensors))


def top_units(scores: Seq[float] | NDArray[np.float64], count: int) -> Indices:
    """The `count` units with the highest scores, in order; of equal ones the first.

    >>> top_units([3.0, 1.0, 2.0], 2).tolist()
    [0, 2]
    """
    return np.sort(np.argsort(-np.asarray(scores), kind="stable")[:count])
