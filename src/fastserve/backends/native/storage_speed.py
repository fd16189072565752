"""How fast sparse weights are against dense ones: one product in turns, by storage and number of rows."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

import fastserve._native as _native
from fastserve.backends.native.aligned_bytes import aligned_bytes
from fastserve.backends.native.quantize_rows import FLOAT_BYTES, row_bytes
from fastserve.backends.native.weight_scheme import SPARSE_STORAGES, Storage, WeightScheme
from fastserve.types import Batch, Float32Array

MIN_TURNS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The matrix that is multiplied, how many copies of it, which come around in turn, and how many seconds
    the turns of a number of rows may take."""

    width: int = 4096
    depth: int = 1024
    copies: int = 16
    seconds: float = 0.3


def measure_speeds(
    runtime: _native.Runtime,
    scheme: WeightScheme,
    share_of_zeros: float,
    rows: Sequence[int],
    *,
    storages: Sequence[Storage] = SPARSE_STORAGES,
    trial: Trial | None = None,
) -> dict[Storage, dict[int, float]]:
    """By storage and number of rows, how many times faster than dense weights with so many zeros. Storages
    that the scheme cannot have are left out.

    Weights come from memory, as in a model larger than the caches: they are put out of all caches, and copies
    have more pages than the processor remembers. Each product is timed at its fastest, and takes less than
    the time for which a system takes a thread off its core: what others do is left out.
    """
    trial = trial or Trial()
    # Scales of float16 are a file's own, which random weights have not; they are read as fast.
    scheme = replace(scheme, scale_format="bf16")
    weight = make_weight((trial.width, trial.depth), share_of_zeros)
    dense = _native.Weight(
        runtime,
        [("f32", weight.view(np.uint8).reshape(-1), *weight.shape)],
        **asdict(replace(scheme, storage="dense")),
    )
    kinds: dict[Storage, _native.Weight] = {"dense": dense}
    kinds |= {name: dense.stored_as(runtime, name) for name in storages if dense.can_be_stored_as(name)}
    speeds: dict[Storage, dict[int, float]] = {name: {} for name in kinds if name != "dense"}
    stacks = {name: _copy(kind, weight.shape, scheme, trial.copies) for name, kind in kinds.items()}
    for num_rows in rows:
        seconds = _time(runtime, stacks, weight.shape, scheme, num_rows, trial.seconds)
        for name, of_rows in speeds.items():
            of_rows[num_rows] = seconds["dense"] / seconds[name]
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
        panels = aligned_bytes(weight.num_bytes)
        panels[:] = weight.panels
        copies.append(_native.Weight.from_panels(panels, *shape, **fields))  # type: ignore[arg-type]
    return copies


def _make_plan(
    runtime: _native.Runtime,
    shape: tuple[int, int],
    scheme: WeightScheme,
    num_rows: int,
    matrix: _native.Weight | None,
) -> _native.Plan:
    """Rows that are quantized and multiplied with the matrix."""
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
    if matrix is not None:
        plan.linear(quantized, matrix, None, out)
    return plan


def _time(
    runtime: _native.Runtime,
    stacks: Mapping[Storage, Sequence[_native.Weight]],
    shape: tuple[int, int],
    scheme: WeightScheme,
    num_rows: int,
    seconds: float,
) -> dict[Storage, float]:
    """The shortest seconds of a product with each kind."""
    positions = np.arange(num_rows, dtype=np.int32)
    batch = Batch(
        token_ids=np.zeros(num_rows, np.int32),
        positions=positions,
        sequence_starts=np.asarray([0, num_rows], np.int32),
        context_lengths=np.asarray([num_rows], np.int32),
        block_tables=np.arange(-(-num_rows // _native.BLOCK_SIZE), dtype=np.int32)[None],
        output_rows=positions,
    )

    def run(plan: _native.Plan) -> float:
        start = time.perf_counter()
        plan.run(batch, None)
        return time.perf_counter() - start

    plans = {
        name: [_make_plan(runtime, shape, scheme, num_rows, weight) for weight in stack]
        for name, stack in stacks.items()
    }
    without_product = _make_plan(runtime, shape, scheme, num_rows, None)
    shortest: dict[Storage, float] = dict.fromkeys(plans, math.inf)
    rest = math.inf
    end = time.perf_counter() + seconds
    num_turns = 0
    while num_turns < MIN_TURNS or time.perf_counter() < end:
        for name, stack in stacks.items():
            index = num_turns % len(stack)
            _native.evict(stack[index].panels)
            run(without_product)  # wakes the threads
            rest = min(rest, run(without_product))
            shortest[name] = min(shortest[name], run(plans[name][index]))
        num_turns += 1
    return {name: max(total - rest, 1e-9) for name, total in shortest.items()}
