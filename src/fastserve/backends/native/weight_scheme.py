"""What the names of weight formats stand for: how every matrix is packed, and the memory it takes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.config import WeightFormat
from fastserve.graph.node import Attention, Embedding, Graph, Linear, MixtureOfExperts, Parameter

logger = logging.getLogger(__name__)

PANEL = 64  # rows that are packed together (csrc/kernels/kernel.h: kPanel)
DEPTH_ALIGNMENT = 8  # columns that integer weights are padded to a multiple of (ditto)

Storage = Literal["dense", "bitmask", "csr"]
SPARSE_STORAGES: tuple[Storage, ...] = ("bitmask", "csr")

_ELEMENT_BITS = {"f32": 32, "f16": 16, "bf16": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightScheme:
    """How one matrix is packed. A weight is scale * value + offset, one scale and offset for each row and
    group of columns; activations that meet integer weights are int8, with a scale for each row and group.

    Attributes:
        format: of the values; those of int8 are within 127 of 0, those of int4 from -8 to 7, or from 0 to 15
            with an offset.
        group_size: columns of a row of weights that share a scale; 0: all of them. The last group is shorter
            where the width is not a multiple of it.
        activation_group_size: columns of a row of activations that share a scale; 0: all of them.
        scale_format: of scales and offsets; f16 are those of the file, kept without rounding.
        offset: `zero_point` is a whole number times the scale, `minimum` any number.
        storage: `bitmask` keeps only integers other than zero, behind masks that say where they are; `csr`
            keeps them row by row with their columns; `chosen` is what `storage_choice` finds fastest for the
            share of zeros. The numbers are the same whatever it is, and so are all results, bit for bit
            (docs/kernels-sparse.md).
    """

    format: Literal["f32", "f16", "bf16", "int8", "int4"]
    group_size: int = 0
    activation_group_size: int = 0
    scale_format: Literal["bf16", "f16"] = "bf16"
    offset: Literal["none", "zero_point", "minimum"] = "none"
    storage: Storage | Literal["chosen"] = "dense"

    @property
    def is_integer(self) -> bool:
        return self.format in ("int8", "int4")

    def num_bytes(self, rows: int, depth: int) -> int:
        """Memory of a dense matrix [rows, depth], padding included; what is sparse by choice takes less."""
        padded_rows = _round_up(rows, PANEL)
        if not self.is_integer:
            return padded_rows * depth * _ELEMENT_BITS[self.format] // 8
        depth = _round_up(depth, DEPTH_ALIGNMENT)
        num_groups = -(-depth // (self.group_size or depth))
        group_bytes = 2 if self.offset == "none" else 4
        return padded_rows * (depth * _ELEMENT_BITS[self.format] // 8 + num_groups * group_bytes)


# Columns of activations that share a scale, unless the weights' groups are smaller. Whole rows would lose
# four times as much (SmolLM2 on wikitext-2, int8: mean KL to float32 0.036 against 0.009; docs/log.md).
ACTIVATION_GROUP_SIZE = 64

INT8 = WeightScheme(format="int8", activation_group_size=ACTIVATION_GROUP_SIZE)


def _int4(group_size: int, *, is_asymmetric: bool = False) -> WeightScheme:
    return WeightScheme(
        format="int4",
        group_size=group_size,
        activation_group_size=min(group_size, ACTIVATION_GROUP_SIZE),
        offset="zero_point" if is_asymmetric else "none",
    )


# Every format but "stored". int4 is 64 columns a group unless it says otherwise, and int8 a whole row.
SCHEMES: Mapping[WeightFormat, WeightScheme] = {
    "f32": WeightScheme(format="f32"),
    "f16": WeightScheme(format="f16"),
    "bf16": WeightScheme(format="bf16"),
    "int8": INT8,
    "int8:g32": WeightScheme(format="int8", group_size=32, activation_group_size=32),
    "int8:g64": WeightScheme(format="int8", group_size=64, activation_group_size=64),
    "int4": _int4(64),
    "int4:g32": _int4(32),
    "int4:g128": _int4(128),
    "int4:asymmetric": _int4(64, is_asymmetric=True),
    "int4:g32:asymmetric": _int4(32, is_asymmetric=True),
    "int4:g128:asymmetric": _int4(128, is_asymmetric=True),
}

_INT8_BLOCKS = WeightScheme(format="int8", group_size=32, activation_group_size=32, scale_format="f16")

# What keeps a stored format's numbers exactly. That of the k formats, whose scales are products, is float32.
STORED_SCHEMES: Mapping[TensorFormat, WeightScheme] = {
    TensorFormat.F32: SCHEMES["f32"],
    TensorFormat.F16: SCHEMES["f16"],
    TensorFormat.BF16: SCHEMES["bf16"],
    TensorFormat.Q8_0: _INT8_BLOCKS,
    TensorFormat.Q5_0: _INT8_BLOCKS,
    TensorFormat.IQ4_NL: _INT8_BLOCKS,
    TensorFormat.Q4_0: WeightScheme(
        format="int4", group_size=32, activation_group_size=32, scale_format="f16"
    ),
    TensorFormat.Q4_1: WeightScheme(
        format="int4", group_size=32, activation_group_size=32, scale_format="f16", offset="minimum"
    ),
    TensorFormat.Q5_1: SCHEMES["f32"],
    TensorFormat.Q2_K: SCHEMES["f32"],
    TensorFormat.Q3_K: SCHEMES["f32"],
    TensorFormat.Q4_K: SCHEMES["f32"],
    TensorFormat.Q5_K: SCHEMES["f32"],
    TensorFormat.Q6_K: SCHEMES["f32"],
}


GROUP_SIZES = (32, 64, 128, 256)  # that the kernels have, beside whole rows


def kept_scheme(tensor: StoredTensor) -> WeightScheme:
    """What keeps a stored tensor's numbers exactly: whole numbers and scales where the kernels have such,
    else what it dequantizes to."""
    kept = _whole_numbers(tensor) if isinstance(tensor, GroupedTensor) else None
    return kept or STORED_SCHEMES[tensor.format]


def _whole_numbers(tensor: GroupedTensor) -> WeightScheme | None:
    group_size = 0 if tensor.group_size >= tensor.shape[1] else tensor.group_size
    has_group = group_size in (0, *GROUP_SIZES) and tensor.group_of_column is None
    if not has_group or tensor.format is TensorFormat.F32:
        return None
    has_zeros = tensor.has_zeros()
    if has_zeros and tensor.bits > 4:
        return None
    return WeightScheme(
        format="int4" if tensor.bits <= 4 else "int8",
        group_size=group_size,
        activation_group_size=min(group_size or ACTIVATION_GROUP_SIZE, ACTIVATION_GROUP_SIZE),
        scale_format="bf16" if tensor.format is TensorFormat.BF16 else "f16",
        offset="zero_point" if has_zeros else "none",
    )


def choose_schemes(
    graph: Graph, weights: WeightFormat, tensors: Mapping[str, StoredTensor]
) -> dict[Parameter, WeightScheme]:
    """The scheme of every matrix of the graph: that of the name, but

    - with int8 and int4, what is stored as whole numbers of no more bits is kept as it is;
    - with int4, embeddings and the head (the linear that makes the logits) are int8: 4 bits hurt them most;
    - in decoders, storage of integers that linears read is chosen by their zeros;
    - those of experts that meet the same rows have one scheme, and routers are float32: a rounded one sends
      rows elsewhere;
    - with "stored", each as the file has it. Stacked matrices that the file has in different formats become
      float32, which is logged.
    """
    mixtures = [node for node in graph.nodes if isinstance(node, MixtureOfExperts)]
    experts = {
        Parameter.stack(parts): parts for node in mixtures for parts in ((*node.gates, *node.ups), node.downs)
    }
    matrices = {node.weight for node in graph.nodes if isinstance(node, Embedding | Linear)} | set(experts)
    if weights == "stored":
        schemes = {parameter: _stored_scheme(parameter, tensors) for parameter in matrices}
    else:
        scheme = SCHEMES[weights]
        kept_finer = _embeddings_and_head(graph) if scheme.format == "int4" else set()
        schemes = {parameter: INT8 if parameter in kept_finer else scheme for parameter in matrices}
        schemes |= _kept_as_they_are(schemes, tensors)
    for stacked, parts in experts.items():
        schemes |= dict.fromkeys(parts, schemes.pop(stacked))
    schemes |= {node.router: SCHEMES["f32"] for node in mixtures}
    for parameter in _read_by_few_rows(graph):
        if schemes[parameter].is_integer and schemes[parameter].offset == "none":
            schemes[parameter] = replace(schemes[parameter], storage="chosen")
    return schemes


def _kept_as_they_are(
    schemes: Mapping[Parameter, WeightScheme], tensors: Mapping[str, StoredTensor]
) -> dict[Parameter, WeightScheme]:
    """Of matrices that are to be integers: what is stored as such, of no more bits."""
    kept = {}
    for parameter, scheme in schemes.items():
        stored = [tensors.get(name) for name in parameter.names] if scheme.is_integer else []
        grouped = [tensor for tensor in stored if isinstance(tensor, GroupedTensor)]
        if grouped and len(grouped) == len(stored):
            found = {kept_scheme(tensor) for tensor in grouped}
            if len(found) == 1 and _ELEMENT_BITS[(own := found.pop()).format] <= _ELEMENT_BITS[scheme.format]:
                kept[parameter] = own
    return kept


def _stored_scheme(parameter: Parameter, tensors: Mapping[str, StoredTensor]) -> WeightScheme:
    stored = [tensors[name] for name in parameter.names]
    schemes = {kept_scheme(tensor) for tensor in stored}
    if len(schemes) == 1:
        return schemes.pop()
    logger.warning(
        "%s are stored in different formats (%s): float32 is used, which holds them all",
        " and ".join(parameter.names),
        ", ".join(sorted({_describe(tensor) for tensor in stored})),
    )
    return SCHEMES["f32"]


def _describe(tensor: StoredTensor) -> str:
    if not isinstance(tensor, GroupedTensor):
        return tensor.format.value
    return f"int{tensor.bits} in groups of {tensor.group_size}"


def _embeddings_and_head(graph: Graph) -> set[Parameter]:
    found = {node.weight for node in graph.nodes if isinstance(node, Embedding)}
    head = graph.head()
    return found if head is None else found | {head.weight}


def _read_by_few_rows(graph: Graph) -> set[Parameter]:
    """Matrices that a decoder's steps multiply with a row for each sequence; a tied embedding too, whose rows
    are found in microseconds even where a panel must be expanded for each."""
    if not any(isinstance(node, Attention) and node.causal for node in graph.nodes):
        return set()
    return {node.weight for node in graph.nodes if isinstance(node, Linear)}


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
