"""Weights: stored tensors packed once each, by the scheme of their parameter, or mapped
as an earlier start packed them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace

import numpy as np

import fastserve._native as _native
from fastserve.backends.native.packed_cache import PackedArray, PackedCache, array_name
from fastserve.backends.native.storage_choice import StorageChoice
from fastserve.backends.native.weight_scheme import WeightScheme
from fastserve.checkpoint.tensor import StoredTensor
from fastserve.graph.node import Parameter
from fastserve.types import Float32Array

logger = logging.getLogger(__name__)


class Weights:
    """Packs matrices on first use and keeps them: tied parameters share memory. Vectors are float32."""

    def __init__(
        self,
        runtime: _native.Runtime,
        tensors: Mapping[str, StoredTensor],
        schemes: Mapping[Parameter, WeightScheme],
        cache: PackedCache | None = None,
        storage_choice: StorageChoice | None = None,
    ) -> None:
        self._runtime = runtime
        self._tensors = tensors
        self._schemes = schemes
        self._cache = cache
        self._storage_choice = storage_choice
        self._packed = cache.load(schemes, runtime.isa) if cache else {}
        self._matrices: dict[Parameter, _native.Weight] = {}

    @property
    def num_bytes(self) -> int:
        """Memory of all packed matrices."""
        return sum(weight.num_bytes for weight in self._matrices.values())

    def matrix(self, parameter: Parameter) -> _native.Weight:
        """The parameter [out, in], packed into panels."""
        if parameter not in self._matrices:
            self._matrices[parameter] = self._map(parameter) or self._pack(parameter)
        return self._matrices[parameter]

    def keep(self) -> None:
        """Save what was packed for the next start, where there is a cache; what came from it is there."""
        if self._cache and not self._packed:
            arrays = {
                array_name(parameter): PackedArray(weight.panels, weight.storage)
                for parameter, weight in self._matrices.items()
            }
            self._cache.save(self._schemes, arrays, self._runtime.isa)

    def storages(self) -> dict[str, int]:
        """How many matrices are stored in each way."""
        return dict(Counter(weight.storage for weight in self._matrices.values()))

    def _map(self, parameter: Parameter) -> _native.Weight | None:
        packed = self._packed.get(array_name(parameter))
        if packed is None:
            return None
        rows = sum(self._tensors[name].shape[0] for name in parameter.names)
        depth = self._tensors[parameter.names[0]].shape[1]
        scheme = {**asdict(self._schemes[parameter]), "storage": packed.storage}
        try:
            return _native.Weight.from_panels(packed.panels, rows, depth, **scheme)
        except ValueError as error:
            logger.warning("%s is damaged in the store and packed again: %s", parameter.names[0], error)
            self._packed = {}  # so that a whole entry takes its place
            return None

    def _pack(self, parameter: Parameter) -> _native.Weight:
        stored = [self._tensors[name] for name in parameter.names]
        sources = [(t.format.value, t.data, t.shape[0], t.shape[1]) for t in stored]
        scheme = self._schemes[parameter]
        if scheme.storage != "chosen":
            return _native.Weight(self._runtime, sources, **asdict(scheme))
        dense = _native.Weight(self._runtime, sources, **asdict(replace(scheme, storage="dense")))
        if self._storage_choice is None:
            return dense
        zeros = dense.share_of_zeros(self._runtime)
        storage = self._storage_choice.choose(self._runtime, scheme, zeros)
        logger.debug("%s: %.1f %% zeros, %s", array_name(parameter), 100 * zeros, storage)
        if storage == "dense":
            return dense
        sparse = dense.stored_as(self._runtime, storage)
        return sparse if sparse.num_bytes < dense.num_bytes else dense

    def vector(self, parameter: Parameter) -> Float32Array:
        """The parameter [width], in float32."""
        stored = [self._tensors[name] for name in parameter.names]
        parts = [self._runtime.decode(t.format.value, t.data, int(np.prod(t.shape))) for t in stored]
        return np.concatenate(parts)
