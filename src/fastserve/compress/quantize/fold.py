"""Scales of a station's input taken into what makes it, so that the model computes what it did: the columns
of the station's matrices are multiplied, and the input divided.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from fastserve.checkpoint.convert import to_f32, to_float_format
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.compress.station import Station
from fastserve.compress.step import WorkingModel
from fastserve.graph.node import (
    Activation,
    Attention,
    GatedActivation,
    Graph,
    LayerNorm,
    Linear,
    Node,
    RmsNorm,
    Slice,
    Value,
)


@dataclass(frozen=True, slots=True)
class Fold:
    """Where the scales of a station's input [in] can go.

    Attributes:
        maker: the node that takes them: a norm, or the linear that makes the values, or one factor of them.
        first_row: of the linear's rows, that takes the first scale.
        num_scales: that may differ: below the width of the input, those of `repeats` neighbouring blocks of
            `block` columns are the same (heads of queries that share one of keys and values).
    """

    maker: RmsNorm | LayerNorm | Linear
    num_scales: int
    first_row: int = 0
    block: int = 1
    repeats: int = 1

    @property
    def rows(self) -> slice:
        """Of a linear, those that take the scales."""
        return slice(self.first_row, self.first_row + self.num_scales)

    def shared(self, values: torch.Tensor) -> torch.Tensor:
        """The means of values [in] that must have one scale: [num_scales]."""
        return values.reshape(-1, self.repeats, self.block).mean(1).flatten()

    def spread(self, scales: torch.Tensor) -> torch.Tensor:
        """Scales [num_scales] for each column of the input [in]."""
        blocks = scales.reshape(-1, 1, self.block).expand(-1, self.repeats, -1)
        return blocks.reshape(-1)


def find_fold(station: Station) -> Fold | None:
    """Where a station's scales can go; None where nothing takes them: others than linears read the input too,
    or what makes it is not linear in any parameters (the residual of a post-norm encoder, a GELU)."""
    graph, x = station.graph, station.x
    if x in graph.outputs.values() or not all(
        isinstance(node, Linear) and _is_alone(node, graph) for node in station.consumers
    ):
        return None
    match station.producer:
        case RmsNorm() | LayerNorm() as norm if norm.weight.shape == (x.width,) and _is_alone(norm, graph):
            return Fold(norm, x.width)
        case GatedActivation(up=up):
            return _rows_of(up, graph)
        case Activation(kind="relu", x=before):  # relu(x / s) is relu(x) / s
            return _rows_of(before, graph)
        case Attention() as attention:
            fold = _rows_of(attention.v, graph)
            repeats = attention.num_heads // attention.num_kv_heads
            return fold and replace(fold, block=attention.head_dim, repeats=repeats)
    return None


def fold_vectors(
    model: WorkingModel, fold: Fold, scales: torch.Tensor
) -> tuple[dict[str, StoredTensor], torch.Tensor]:
    """The vectors of a station's maker with its output divided by scales [num_scales], and the scales that
    this comes to: a norm's weights stay in the format that they have, so that their rounding decides.
    """
    maker = fold.maker
    changed: dict[str, StoredTensor] = {}
    if isinstance(maker, Linear):
        if maker.bias is not None:
            bias = model.tensors[maker.bias.names[0]]
            values = to_f32(bias)
            values[fold.rows] /= scales.numpy()
            changed[bias.name] = _in_format(bias, values)
        return changed, scales
    offset = np.float32(maker.offset if isinstance(maker, RmsNorm) else 0.0)
    stored = model.tensors[maker.weight.names[0]]
    weight = to_f32(stored) + offset
    changed[stored.name] = _in_format(stored, weight / scales.numpy() - offset)
    divided = to_f32(changed[stored.name]) + offset
    is_told = (weight != 0) & (divided != 0)
    told = np.divide(weight, divided, out=scales.numpy().copy(), where=is_told)
    if isinstance(maker, LayerNorm) and maker.bias is not None:
        bias = model.tensors[maker.bias.names[0]]
        changed[bias.name] = _in_format(bias, to_f32(bias) / told)
    return changed, torch.from_numpy(told)


def with_short_vectors(model: WorkingModel) -> WorkingModel:
    """With weights of norms as bfloat16 where they are numbers of it, as GGUF never has them: others load
    them so, and scales that are folded into them must be those that are then divided by. Biases stay: nothing
    makes up for their rounding.
    """
    changed: dict[str, StoredTensor] = {}
    for name, tensor in model.tensors.items():
        if len(tensor.shape) == 1 and tensor.format is TensorFormat.F32 and not name.endswith(".bias"):
            short = StoredTensor(
                name, TensorFormat.BF16, tensor.shape, to_float_format(to_f32(tensor), TensorFormat.BF16)
            )
            if np.array_equal(to_f32(short), to_f32(tensor)):
                changed[name] = short
    return model.with_tensors(changed)


@dataclass(frozen=True, slots=True)
class Factors:
    """What matrices are to be multiplied with, by name, for scales that were folded.

    Attributes:
        rows: [out], of makers.
        columns: [in], of those that multiply with the station's input.
    """

    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    columns: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, station: Station, fold: Fold, scales: torch.Tensor) -> None:
        """Those of a station whose scales [num_scales] are the ones that `fold_vectors` gives."""
        if isinstance(fold.maker, Linear):
            (name,) = fold.maker.weight.names
            rows = self.rows.setdefault(name, torch.ones(fold.maker.weight.shape[0]))
            rows[fold.rows] /= scales
        for node in station.consumers:
            assert isinstance(node, Linear)
            self.columns[node.weight.names[0]] = fold.spread(scales)

    @property
    def names(self) -> set[str]:
        return {*self.rows, *self.columns}

    def apply(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """A matrix [out, in], multiplied."""
        if name in self.rows:
            values = values * self.rows[name][:, None]
        return values * self.columns[name] if name in self.columns else values


def float_tensor(name: str, values: torch.Tensor) -> StoredTensor:
    """Values as a tensor of float32."""
    data = np.ascontiguousarray(values.numpy(), np.float32).reshape(-1).view(np.uint8)
    return StoredTensor(name, TensorFormat.F32, tuple(values.shape), data)


def _rows_of(value: Value, graph: Graph) -> Fold | None:
    """The rows of a linear that make a value which one node reads, be it as a part of its output."""
    maker, first_row = graph.producers()[value], 0
    if len(graph.consumers()[value]) != 1:
        return None
    if isinstance(maker, Slice):
        first_row = maker.start
        maker = graph.producers()[maker.x]
    if not isinstance(maker, Linear) or not _is_alone(maker, graph):
        return None
    return Fold(maker, value.width, first_row)


def _is_alone(node: Node, graph: Graph) -> bool:
    """Whether no other node has its parameters."""
    names = {parameter.names for parameter in node.parameters()}
    others = (p.names for other in graph.nodes if other is not node for p in other.parameters())
    return names.isdisjoint(others)


def _in_format(like: StoredTensor, values: NDArray[np.float32]) -> StoredTensor:
    """Values in the format of a tensor, where that is one of single numbers; else as float32."""
    stored_format = like.format if like.format.block_elements == 1 else TensorFormat.F32
    return StoredTensor(like.name, stored_format, like.shape, to_float_format(values, stored_format))
