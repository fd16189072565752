"""Students: what a smaller model is before it learns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.compress.prune.cut import without_layers
from fastserve.compress.prune.structure import find_structure
from fastserve.compress.step import WorkingModel
from fastserve.errors import OptionError
from fastserve.models.family import build_graph, read_config
from fastserve.option import check_number


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentOptions:
    """Which layers of the model a student keeps, and what else is changed in its config.

    Attributes:
        share: of the layers, evenly spread, where `layers` does not name them.
        layers: those that are kept, from 0.
        config: keys of config.json with other values, such as {"intermediate_size": 768}; matrices that then
            have another shape are drawn at random, the others keep their weights.
    """

    share: float = 1.0
    layers: tuple[int, ...] | None = None
    config: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_number("share", self.share, 0.0, 1.0, is_low_open=True)
        if self.layers is not None and self.share != 1.0:
            raise OptionError("share and layers say the same", hint="leave one of them out", option="layers")

    @property
    def is_all(self) -> bool:
        """Whether this is the model itself."""
        return self.share == 1.0 and self.layers is None and not self.config


@dataclass(frozen=True, slots=True)
class Student:
    """
    Attributes:
        layer_map: of each layer, the one of the teacher that it was.
    """

    model: WorkingModel
    layer_map: tuple[int, ...]

    @property
    def num_parameters(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.model.tensors.values())


def make_student(model: WorkingModel, options: StudentOptions, *, seed: int) -> Student:
    """
    Raises:
        OptionError: layers that there are not, or a config that the family does not have.
        UnsupportedError: a family whose layers are not named.
    """
    structure = find_structure(model)
    kept = _kept_layers(structure.num_layers, options)
    student = without_layers(model, structure, set(range(structure.num_layers)) - set(kept))
    if options.config:
        _check_config(options.config, structure.keys.layers)
        student = _with_config(student, options.config, seed)
    return Student(student, kept)


def _kept_layers(num_layers: int, options: StudentOptions) -> tuple[int, ...]:
    if options.layers is None:
        count = max(1, round(options.share * num_layers))
        # The last layer feeds the head: of each run of layers the last one stays.
        return tuple(-(-(index + 1) * num_layers // count) - 1 for index in range(count))
    kept = tuple(sorted(set(options.layers)))
    if not kept or kept[0] < 0 or kept[-1] >= num_layers:
        raise OptionError(
            f"layers={list(options.layers)}: the model has {num_layers}",
            hint=f"choose from 0 to {num_layers - 1}",
            option="layers",
        )
    return kept


def _check_config(changes: Mapping[str, Any], layers: str) -> None:
    """
    Raises:
        OptionError: a key changes something else than the shapes of matrices.
    """
    hints = {
        layers: "name the layers to keep with layers, or how many of them with share",
        "vocab_size": "leave it out: a student has the tokenizer of its teacher",
    }
    for key, hint in hints.items():
        if key in changes:
            raise OptionError(f"config: {key} is not to be changed", hint=hint, option="config")


def _with_config(model: WorkingModel, changes: Mapping[str, Any], seed: int) -> WorkingModel:
    """The model with another config; matrices of other shapes drawn as `transformers` draws them, with a
    standard deviation of `initializer_range`."""
    unknown = sorted(changes.keys() - model.config.keys())
    if unknown:
        raise OptionError(
            f"config: the model has no {unknown[0]!r}",
            hint=f"it has {', '.join(sorted(model.config))}",
            option="config",
        )
    config = {**model.config, **changes}
    graph = build_graph(read_config(config), model.tensors.keys())
    needed = {
        name: (rows, *parameter.shape[1:])
        for node in graph.nodes
        for parameter in node.parameters()
        for name, rows in _rows_of(parameter.names, parameter.shape[0], model)
    }
    random = np.random.default_rng(seed)
    deviation = float(config.get("initializer_range", 0.02))
    tensors = {
        name: tensor
        if needed.get(name, tensor.shape) == tensor.shape
        else _draw(tensor, needed[name], random, deviation)
        for name, tensor in model.tensors.items()
    }
    checkpoint: Checkpoint = replace(model.checkpoint, config=config, tensors=tensors)
    return replace(model, checkpoint=checkpoint)


def _rows_of(names: tuple[str, ...], rows: int, model: WorkingModel) -> list[tuple[str, int]]:
    """How many rows each of the tensors has that a parameter is made of."""
    if len(names) == 1:
        return [(names[0], rows)]
    own = [model.tensors[name].shape[0] for name in names]
    return [(name, rows * each // sum(own)) for name, each in zip(names, own, strict=True)]


def _draw(
    tensor: StoredTensor, shape: tuple[int, ...], random: np.random.Generator, deviation: float
) -> StoredTensor:
    if len(shape) == 1:  # norms begin with ones, biases with zeros
        values = np.full(shape, float(tensor.name.endswith("weight")), np.float32)
    else:
        values = random.normal(0.0, deviation, shape).astype(np.float32)
    return StoredTensor(tensor.name, TensorFormat.F32, shape, values.reshape(-1).view(np.uint8))
