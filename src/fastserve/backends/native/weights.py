"""Weights: stored tensors packed once each, by the scheme of their parameter, or mapped
as an earlier start packed them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np

import fastserve._native as _native
from fastserve.backends.native.packed_cache import PackedCache, array_name
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
        cache: PackedCache | None = None,
    ) -> None:
        self._runtime = runtime
        self._tensors = tensors
        self._schemes = schemes
        self._cache = cache
        self._packed = cache.load(schemes) if cache else {}
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
            self._matrices[parameter] = self._map(parameter) or self._pack(parameter)
        return self._matrices[parameter]

    def keep(self) -> None:
        """Save what was packed for the next start, where there is a cache; what came from it is there."""
        if self._cache and not self._packed:
            panels = {array_name(parameter): weight.panels for parameter, weight in self._matrices.items()}
            self._cache.save(self._schemes, panels)

    def _map(self, parameter: Parameter) -> _native.Weight | None:
        panels = self._packed.get(array_name(parameter))
        if panels is None:
            return None
        rows = sum(self._tensors[name].shape[0] for name in parameter.names)
        depth = self._tensors[parameter.names[0]].shape[1]
        return _native.Weight.from_panels(panels, rows, depth, **asdict(self._schemes[parameter]))

    def _pack(self, parameter: Parameter) -> _native.Weight:
        stored = [self._tensors[name] for name in parameter.names]
        sources = [(t.format.value, t.data, t.shape[0], t.shape[1]) for t in stored]
        return _native.Weight(self._runtime, sources, **asdict(self._schemes[parameter]))

    def vector(self, parameter: Parameter) -> Float32Array:
        """The parameter [width], in float32."""
        stored = [self._tensors[name] for name in parameter.names]
        parts = [self._runtime.decode(t.format.value, t.data, int(np.prod(t.shape))) for t in stored]
        return np.concatenate(parts)
