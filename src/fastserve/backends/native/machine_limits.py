"""What the machine does at most, measured on the threads and with the instructions that kernels run with."""

from __future__ import annotations

from collections.abc import Mapping

import fastserve._native as _native
from fastserve.backends.native.executable import make_runtime


class LimitProbe:
    """Measures limits on so many threads (None: the cores that this process may use).

    Raises:
        OptionError: as `compile_native`.
    """

    def __init__(self, threads: int | None = None, isa: str | None = None) -> None:
        self._runtime = make_runtime(threads, isa)

    @property
    def num_threads(self) -> int:
        return self._runtime.num_threads

    @property
    def isa(self) -> str:
        return self._runtime.isa

    def read_bytes_per_second(self, working_set_bytes: int, *, seconds: float) -> Mapping[str, float]:
        """By way of reading, the fastest pass over memory of this size, which is at least 1 MiB."""
        rates = _native.measure_read(self._runtime, working_set_bytes, seconds)
        return dict(zip(_native.READ_KINDS, rates, strict=True))

    def int8_operations_per_second(self, *, seconds: float) -> float:
        """Dot products of bytes in registers; a multiplication with its addition is two operations."""
        return _native.measure_dot_products(self._runtime, seconds)

    def f32_operations_per_second(self, *, seconds: float) -> float:
        """Multiply-adds in registers, each two operations."""
        return _native.measure_multiply_adds(self._runtime, seconds)
