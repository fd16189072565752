"""Weights: stored tensors packed once each, by the scheme of their parameter, or mapped
as an earlier start packed them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
from numpy.typing import NDArray

import fastserve._native as _native
from fastserve.backends.native.aligned_bytes import aligned_bytes
from fastserve.backends.native.packed_cache import PackedArray, PackedCache, array_name
from fastserve.backends.native.storage_choice import StorageChoice
from fastserve.backends.native.weight_scheme import DEPTH_ALIGNMENT, PANEL, WeightScheme, kept_scheme
from fastserve.checkpoint.convert import to_float_format
from fastserve.checkpoint.grouped_tensor import GroupedTensor, Groups
from fastserve.checkpoint.tensor import ComputedTensor, StoredTensor, TensorFormat
from fastserve.graph.node import Parameter
from fastserve.types import Float32Array

logger = logging.getLogger(__name__)

_FLOATS_AT_A_TIME = 2**22  # of tensors that are computed while they are packed


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
        scheme = self._schemes[parameter]
        if scheme.storage != "chosen":
            return pack(self._runtime, stored, scheme)
        dense = pack(self._runtime, stored, replace(scheme, storage="dense"))
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


def pack(runtime: _native.Runtime, stored: Sequence[StoredTensor], scheme: WeightScheme) -> _native.Weight:
    """Pack tensors, stacked along their rows. What is stored as `scheme` packs it is moved, all else rounded;
    tensors that are computed from others are so some panels at a time.
    """
    rows, depth = sum(tensor.shape[0] for tensor in stored), stored[0].shape[1]
    is_moved = [_is_packed_as_stored(tensor, scheme) for tensor in stored]

    def read(begin: int, end: int) -> list[_Source]:
        sources, first = [], 0
        for tensor, is_kept in zip(stored, is_moved, strict=True):
            low, high = max(begin - first, 0), min(end - first, tensor.shape[0])
            if low < high:
                sources.append(_source(tensor, low, high, scheme if is_kept else None))
            first += tensor.shape[0]
        return sources

    is_whole = scheme.storage != "dense" or not any(isinstance(tensor, ComputedTensor) for tensor in stored)
    rows_at_a_time = max(_FLOATS_AT_A_TIME // max(depth, 1) // PANEL, 1) * PANEL
    if is_whole or rows <= rows_at_a_time:
        return _native.Weight(runtime, read(0, rows), **asdict(scheme))
    panels = aligned_bytes(scheme.num_bytes(rows, depth))
    filled = 0
    for begin in range(0, rows, rows_at_a_time):
        sources = read(begin, min(begin + rows_at_a_time, rows))
        part = _native.Weight(runtime, sources, **asdict(scheme)).panels
        panels[filled : filled + len(part)] = part
        filled += len(part)
    return _native.Weight.from_panels(panels, rows, depth, **asdict(scheme))


_Source = tuple[str, NDArray[np.uint8], int, int]
"""Rows of a tensor as the native converter takes them: format, bytes, rows, columns."""


def _is_packed_as_stored(tensor: StoredTensor, scheme: WeightScheme) -> bool:
    is_whole_numbers = isinstance(tensor, GroupedTensor) and scheme.is_integer
    return is_whole_numbers and kept_scheme(tensor) == replace(scheme, storage="dense")


def _source(tensor: StoredTensor, begin: int, end: int, kept: WeightScheme | None) -> _Source:
    depth = tensor.shape[1]
    if kept is not None and isinstance(tensor, GroupedTensor):
        return "groups", _group_bytes(tensor.groups(begin, end), kept), end - begin, depth
    return tensor.format.value, tensor.rows(begin, end).data, end - begin, depth


def _group_bytes(groups: Groups, scheme: WeightScheme) -> NDArray[np.uint8]:
    """Rows as the native converter takes whole numbers: see StoredFormat::groups in csrc/kernels/kernel.h."""
    codes = groups.codes
    rows, depth = codes.shape
    scale_format = TensorFormat.BF16 if scheme.scale_format == "bf16" else TensorFormat.F16
    middle = np.uint8(128 if scheme.format == "int8" else 8)
    padding = np.full((rows, -depth % DEPTH_ALIGNMENT), middle, np.uint8)
    numbers = [groups.scales]
    if scheme.offset == "zero_point":
        zeros = np.zeros_like(groups.scales) if groups.zeros is None else groups.zeros.astype(np.float32)
        numbers.append(-(zeros + np.float32(middle)))
    halves = [to_float_format(array, scale_format).reshape(rows, -1) for array in numbers]
    return np.concatenate([*halves, codes.view(np.uint8) + middle, padding], axis=1).reshape(-1)
