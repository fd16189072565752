"""How much memory a model will take, reckoned from its graph before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fastserve.backends.native.weight_scheme import WeightScheme
from fastserve.config import Backend, KvDtype
from fastserve.errors import MemoryLimitError
from fastserve.graph.memory import FLOAT_BYTES
from fastserve.graph.node import Graph, Parameter, PoolNode

BLOCK_SIZE = 32  # tokens of a KV block, the same in every backend
RUNTIME_BYTES = 64 * 2**20  # tokenizer, libraries and scratch of the threads, with a margin

_KV_BYTES: Mapping[KvDtype, int] = {"f32": 4, "f16": 2, "bf16": 2, "int8": 1}
_HEAD_DIM_MULTIPLE = 16  # stored heads are padded to it


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes by what they are for."""

    weights_bytes: int
    kv_bytes: int
    activation_bytes: int
    runtime_bytes: int = RUNTIME_BYTES

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.activation_bytes + self.runtime_bytes

    def check(self, available_bytes: int) -> None:
        """
        Raises:
            MemoryLimitError: the footprint is larger than what is available.
        """
        if self.total_bytes > available_bytes:
            raise self.to_error(available_bytes)

    def to_error(self, available_bytes: int | None) -> MemoryLimitError:
        """The error of a model that does not fit; `available_bytes` is None where nobody says."""
        left = "less is" if available_bytes is None else f"{_mib(available_bytes)} are"
        return MemoryLimitError(
            f"the model needs {_mib(self.total_bytes)} of memory (weights {_mib(self.weights_bytes)}, "
            f"keys and values {_mib(self.kv_bytes)}, activations {_mib(self.activation_bytes)}, "
            f"runtime {_mib(self.runtime_bytes)}); {left} available",
            hint=f"{self._remedy()}, or free memory",
        )

    def _remedy(self) -> str:
        """What makes the largest part smaller."""
        largest = max(self.weights_bytes, self.kv_bytes, self.activation_bytes)
        if largest == self.kv_bytes:
            return "choose a smaller context_length or kv_memory, or kv_dtype='int8'"
        if largest == self.activation_bytes:
            return "choose a smaller max_batch_tokens, max_sequences or context_length"
        return "use weights='int8' or 'int4', or a smaller model"


def weights_bytes(graph: Graph, schemes: Mapping[Parameter, WeightScheme]) -> int:
    """Bytes of the parameters: matrices by their schemes, the rest as f32; what nodes share counts once."""
    parameters = {parameter for node in graph.nodes for parameter in node.parameters()}
    return sum(_parameter_bytes(parameter, schemes) for parameter in parameters)


def block_bytes(graph: Graph, kv_dtype: KvDtype, backend: Backend = "native") -> int:
    """Bytes of one KV block over all layers: `Executable.block_bytes`, before there is one.

    Of the native backend as csrc/kernels/kernel.h lays it out (KvLayout). The torch backend keeps them
    without padding, and of int8 the floats that it comes to (`backends/torch/step.py`).
    """
    layers = {node.pool_layer: node for node in graph.nodes if isinstance(node, PoolNode)}
    if backend == "torch":
        element_bytes = FLOAT_BYTES if kv_dtype == "int8" else _KV_BYTES[kv_dtype]
        return sum(2 * n.num_kv_heads * BLOCK_SIZE * n.head_dim * element_bytes for n in layers.values())
    scale_bytes = FLOAT_BYTES if kv_dtype == "int8" else 0
    return sum(
        2 * n.num_kv_heads * BLOCK_SIZE * (_padded(n.head_dim) * _KV_BYTES[kv_dtype] + scale_bytes)
        for n in layers.values()
    )


def _padded(head_dim: int) -> int:
    return -(-head_dim // _HEAD_DIM_MULTIPLE) * _HEAD_DIM_MULTIPLE


def _parameter_bytes(parameter: Parameter, schemes: Mapping[Parameter, WeightScheme]) -> int:
    if parameter not in schemes:
        return math.prod(parameter.shape) * FLOAT_BYTES
    num_rows, depth = parameter.shape
    return schemes[parameter].num_bytes(num_rows, depth)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"
