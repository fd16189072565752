"""Weights of a native executable: stored tensors packed once each, by the scheme of their parameter."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

import fastserve._native as _native
from fastserve.backends.native.weight_scheme import WeightScheme
from fastserve.checkpoint.tensor import StoredTensor
from fastserve.graph.node import Parameter
from fastserve.types import Float32Array


class Weights:
    """Packs matrices on first use and keeps them: tied parameters share memory. Vectors are float32."""

    def __init__(
        self,
        runtime: _native.Runtime,
        tensors: Mapping[str, StoredTensor],
        schemes: Mapping[Parameter, WeightScheme],
    ) -> None:
        self._runtime = runtime
        self._tensors = tensors
        self._schemes = schemes
        self._matrices: dict[Parameter, _native.Weight] = {}

    @property
    def num_bytes(self) -> int:
        """Memory of all packed matrices."""
        return sum(weight.num_bytes for weight in self._matrices.values())

    def activation_group_size(self, parameter: Parameter) -> int | None:
        """Columns of a linear's input that share a scale (0: all); None where it is not quantized."""
        scheme = self._schemes[parameter]
        return scheme.activation_group_size if scheme.is_integer else None

    def matrix(self, parameter: Parameter) -> _native.Weight:
        """The parameter [out, in], packed into panels."""
        if parameter not in self._matrices:
            stored = [self._tensors[name] for name in parameter.names]
            sources = [(t.format.value, t.data, t.shape[0], t.shape[1]) for t in stored]
            scheme = self._schemes[parameter]
            self._matrices[parameter] = _native.Weight(
                self._runtime,
                sources,
                scheme.format,
                group_size=scheme.group_size,
                activation_group_size=scheme.activation_group_size,
                scale_format=scheme.scale_format,
                offset=scheme.offset,
            )
        return self._matrices[parameter]

    def vector(self, parameter: Parameter) -> Float32Array:
        """The parameter [width], in float32."""
        stored = [self._tensors[name] for name in parameter.names]
        parts = [self._runtime.decode(t.format.value, t.data, int(np.prod(t.shape))) for t in stored]
        return np.concatenate(parts)
