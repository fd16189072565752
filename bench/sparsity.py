"""Where sparse weights pay: the speed of a bitmask against dense weights, by format, share of zeros and rows.

A step is a stack of matrices as in decoding, together larger than most caches; both kinds run in turns.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, replace

import numpy as np

import fastserve._native as _native
from fastserve.backends.native.executable import make_runtime
from fastserve.backends.native.quantize_rows import row_bytes
from fastserve.backends.native.weight_scheme import SCHEMES, WeightScheme
from fastserve.types import Batch, Float32Array
from report import make_parser, publish

SHARES_OF_ZEROS = (0.0, 0.3, 0.4, 0.5, 0.7, 0.9, 0.95)
NUM_ROWS = (1, 8, 128)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=8192)
    parser.add_argument("--matrices", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=9)
    options = parser.parse_args()
    runtime = make_runtime(options.threads)
    rng = np.random.default_rng(1)
    results: dict[str, dict[str, dict[str, float]]] = {}
    rows: list[tuple[str, object]] = []
    for name in ("int8", "int4"):
        for share in SHARES_OF_ZEROS:
            weight = make_weight(rng, (options.width, options.depth), share)
            dense = SCHEMES[name]  # type: ignore[index]
            stacks = [
                [pack(runtime, weight, scheme) for _ in range(options.matrices)]
                for scheme in (dense, replace(dense, storage="bitmask"))
            ]
            ratios = {}
            for num_rows in NUM_ROWS:
                pair = [make_plan(runtime, weight.shape, dense, num_rows, stack) for stack in stacks]
                ratios[str(num_rows)] = compare(*pair, num_rows, options.pairs)
            results.setdefault(name, {})[str(share)] = ratios
            rows.append((f"{name}, {share:.0%} zeros", "  ".join(f"{r}: {x:.2f}" for r, x in ratios.items())))
    publish(options, {"bitmask_speed_by_format_zeros_rows": results}, rows)


def make_weight(rng: np.random.Generator, shape: tuple[int, int], share_of_zeros: float) -> Float32Array:
    """Numbers from -1 to 1, none so small that rounding makes it another zero."""
    values = rng.uniform(0.2, 1, shape) * rng.choice([-1, 1], shape)
    return np.where(rng.random(shape) < share_of_zeros, 0, values).astype(np.float32)


def pack(runtime: _native.Runtime, weight: Float32Array, scheme: WeightScheme) -> _native.Weight:
    return _native.Weight(
        runtime, [("f32", weight.view(np.uint8).reshape(-1), *weight.shape)], **asdict(scheme)
    )


def make_plan(
    runtime: _native.Runtime,
    shape: tuple[int, int],
    scheme: WeightScheme,
    num_rows: int,
    stack: list[_native.Weight],
) -> _native.Plan:
    """Rows that are quantized once and multiplied with every matrix of a stack."""
    width, depth = shape
    group_size = scheme.activation_group_size
    quantized_bytes = row_bytes(depth, group_size)
    x_end = 4 * num_rows * depth
    out_start = x_end + num_rows * quantized_bytes
    plan = _native.Plan(
        runtime,
        out_start + 4 * num_rows * width,
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
    quantized = _native.Matrix(x_end, quantized_bytes // 4, depth, tokens, group_size)
    out = _native.Matrix(out_start, width, width, tokens)
    embedded = np.linspace(-1, 1, depth, dtype=np.float32)
    plan.embedding(
        _native.IdSource.token_ids,
        _native.Weight(runtime, [("f32", embedded.view(np.uint8), 1, depth)], "f32"),
        x,
    )
    plan.quantize_rows(x, quantized)
    for weight in stack:
        plan.linear(quantized, weight, None, out)
    return plan


def compare(dense: _native.Plan, bitmask: _native.Plan, num_rows: int, num_pairs: int) -> float:
    """The median, over runs that follow each other, of dense time to bitmask time."""
    positions = np.arange(num_rows, dtype=np.int32)
    batch = Batch(
        token_ids=np.zeros(num_rows, np.int32),
        positions=positions,
        sequence_starts=np.asarray([0, num_rows], np.int32),
        context_lengths=np.asarray([num_rows], np.int32),
        block_tables=np.arange(-(-num_rows // _native.BLOCK_SIZE), dtype=np.int32)[None],
        output_rows=positions,
    )
    ratios = []
    for _ in range(num_pairs):
        seconds = []
        for plan in (dense, bitmask):
            start = time.perf_counter()
            plan.run(batch, None)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


if __name__ == "__main__":
    main()
