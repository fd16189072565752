"""How fast sparse weights are against dense ones: linears in turns, by storage and number of rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

import fastserve._native as _native
from fastserve.backends.native.quantize_rows import FLOAT_BYTES, row_bytes
from fastserve.backends.native.weight_scheme import SPARSE_STORAGES, Storage, WeightScheme
from fastserve.types import Batch, Float32Array

MIB = 2**20
_ALIGNMENT = 64  # of panels (csrc/memory.h: kAlignment)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Equal matrices that one step multiplies the same rows with, one after the other: as many as make the
    dense ones larger than the caches whose speed nobody decodes at."""

    width: int = 4096
    depth: int = 1024
    dense_bytes: int = 64 * MIB
    pairs: int = 5

    def copies(self, scheme: WeightScheme, num_rows: int) -> int:
        """Many rows wait for arithmetic, not for memory: a few matrices show it."""
        copies = max(1, self.dense_bytes // scheme.num_bytes(self.width, self.depth))
        return copies if num_rows <= 16 else min(copies, 4)


def measure_speeds(
    runtime: _native.Runtime,
    scheme: WeightScheme,
    share_of_zeros: float,
    rows: Sequence[int],
    *,
    storages: Sequence[Storage] = SPARSE_STORAGES,
    stack: Stack | None = None,
) -> dict[Storage, dict[int, float]]:
    """By storage and number of rows, how many times faster than dense weights with so many zeros: the median
    over runs in turns. Storages that the scheme cannot have are left out."""
    stack = stack or Stack()
    weight = make_weight((stack.width, stack.depth), share_of_zeros)
    dense = _native.Weight(
        runtime,
        [("f32", weight.view(np.uint8).reshape(-1), *weight.shape)],
        **asdict(replace(scheme, storage="dense")),
    )
    kinds: dict[Storage, _native.Weight] = {"dense": dense}
    kinds |= {name: dense.stored_as(runtime, name) for name in storages if dense.can_be_stored_as(name)}
    copies = max(stack.copies(scheme, num_rows) for num_rows in rows)
    stacks = {name: _copy(kind, weight.shape, scheme, copies) for name, kind in kinds.items()}
    speeds: dict[Storage, dict[int, float]] = {name: {} for name in kinds if name != "dense"}
    for num_rows in rows:
        count = stack.copies(scheme, num_rows)
        plans = {
            name: _make_plan(runtime, weight.shape, scheme, num_rows, matrices[:count])
            for name, matrices in stacks.items()
        }
        for name, speed in _compare(plans, num_rows, stack.pairs).items():
            speeds[name][num_rows] = speed
    return speeds


def make_weight(shape: tuple[int, int], share_of_zeros: float) -> Float32Array:
    """Numbers from -1 to 1, none so small that rounding makes it another zero."""
    rng = np.random.default_rng(1)
    values = rng.uniform(0.2, 1, shape) * rng.choice([-1, 1], shape)
    return np.where(rng.random(shape) < share_of_zeros, 0, values).astype(np.float32)


def _copy(
    weight: _native.Weight, shape: tuple[int, int], scheme: WeightScheme, count: int
) -> list[_native.Weight]:
    """The weight and copies of it."""
    fields: dict[str, object] = {**asdict(scheme), "storage": weight.storage}
    copies = [weight]
    for _ in range(count - 1):
        memory = np.empty(weight.num_bytes + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        panels = memory[start : start + weight.num_bytes]
        panels[:] = weight.panels
        copies.append(_native.Weight.from_panels(panels, *shape, **fields))  # type: ignore[arg-type]
    return copies


def _make_plan(
    runtime: _native.Runtime,
    shape: tuple[int, int],
    scheme: WeightScheme,
    num_rows: int,
    matrices: Sequence[_native.Weight],
) -> _native.Plan:
    """Rows that are quantized once and multiplied with every matrix."""
    width, depth = shape
    group_size = scheme.activation_group_size
    quantized_bytes = row_bytes(depth, group_size)
    x_end = FLOAT_BYTES * num_rows * depth
    out_start = x_end + num_rows * quantized_bytes
    plan = _native.Plan(
        runtime,
        out_start + FLOAT_BYTES * num_rows * width,
        max_tokens=num_rows,
        max_outputs=num_rows,
        max_sequences=1,
        num_blocks=num_rows,
        max_context=num_rows,
        vocab_size=1,
        num_token_types=0,
        needs_whole_sequences=False,
    )
    tokens = _native.Rows.TOKENS
    x = _native.Matrix(0, depth, depth, tokens)
    quantized = _native.Matrix(x_end, quantized_bytes // FLOAT_BYTES, depth, tokens, group_size)
    out = _native.Matrix(out_start, width, width, tokens)
    embedded = np.linspace(-1, 1, depth, dtype=np.float32)
    table = _native.Weight(runtime, [("f32", embedded.view(np.uint8), 1, depth)], "f32")
    plan.embedding(_native.IdSource.token_ids, table, x)
    plan.quantize_rows(x, quantized)
    for matrix in matrices:
        plan.linear(quantized, matrix, None, out)
    return plan


def _compare(plans: Mapping[Storage, _native.Plan], num_rows: int, num_pairs: int) -> dict[Storage, float]:
    """Of each sparse storage, the median over turns of dense time to its own."""
    positions = np.arange(num_rows, dtype=np.int32)
    batch = Batch(
        token_ids=np.zeros(num_rows, np.int32),
        positions=positions,
        sequence_starts=np.asarray([0, num_rows], np.int32),
        context_lengths=np.asarray([num_rows], np.int32),
        block_tables=np.arange(-(-num_rows // _native.BLOCK_SIZE), dtype=np.int32)[None],
        output_rows=positions,
    )
    ratios: dict[Storage, list[float]] = {name: [] for name in plans if name != "dense"}
    for turn in range(num_pairs + 1):
        seconds: dict[str, float] = {}
        for name, plan in plans.items():
            start = time.perf_counter()
            plan.run(batch, None)
            seconds[name] = time.perf_counter() - start
        if turn:  # the first warms up
            for name, values in ratios.items():
                values.append(seconds["dense"] / seconds[name])
    return {name: statistics.median(values) for name, values in ratios.items()}
