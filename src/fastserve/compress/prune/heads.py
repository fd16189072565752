"""Encoders that heads were pruned from, with zeros in their place: what `transformers`, whose heads share the
hidden size out among them, opens and trains."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.tensor import StoredTensor
from fastserve.compress.prune.cut import Indices, without_units
from fastserve.compress.prune.matrix import write_matrix
from fastserve.compress.prune.structure import FAMILIES, find_structure
from fastserve.compress.step import WorkingModel
from fastserve.models.config import EncoderConfig
from fastserve.models.family import read_config
from fastserve.types import Float32Array


def missing_heads(model: WorkingModel) -> int:
    """How many heads were taken from each layer of an encoder of a family that has no key for it.

    >>> missing_heads(model)  # of a BERT with heads of 32, 384 wide, 7 heads left  # doctest: +SKIP
    5
    """
    if model.config.get("model_type") not in FAMILIES or model.config.get("head_dim") is None:
        return 0
    config = read_config(model.config)
    if not isinstance(config, EncoderConfig):
        return 0
    return config.hidden_size // config.head_dim - config.num_heads


def with_all_heads(model: WorkingModel) -> WorkingModel:
    """The model with heads of zeros in place of those that were taken out, behind the others: what it
    computes is the same."""
    if not missing_heads(model):
        return model
    structure, config = find_structure(model), read_config(model.config)
    num_heads = config.hidden_size // config.head_dim
    changed: dict[str, StoredTensor] = {}

    def pad(name: str, axis: int, size: int) -> None:
        tensor = model.tensors[name]
        changed[name] = write_matrix(tensor, _pad(to_f32(tensor), axis, size))

    for part in structure.attentions:
        for linear, height in part.makers:
            for parameter in (linear.weight, linear.bias):
                if parameter is not None:
                    pad(parameter.names[0], 0, num_heads * height)
        pad(part.name, 1, num_heads * part.width)
    if structure.bias is not None:
        pad(structure.bias, 1, num_heads)
    changed_config = {key: value for key, value in model.config.items() if key != "head_dim"}
    changed_config[structure.keys.heads] = num_heads
    padded = model.with_tensors(changed)
    return replace(padded, checkpoint=replace(padded.checkpoint, config=changed_config))


def without_last_heads(model: WorkingModel, count: int) -> WorkingModel:
    """The model without the last `count` heads of each layer: what `with_all_heads` has put there."""
    if not count:
        return model
    structure = find_structure(model)
    kept: dict[str, Indices] = {part.name: np.arange(part.num_units - count) for part in structure.attentions}
    return without_units(model, structure, kept, are_heads=True)


def _pad(values: Float32Array, axis: int, size: int) -> Float32Array:
    widths = [(0, size - length if at == axis else 0) for at, length in enumerate(values.shape)]
    return np.pad(values, widths)
