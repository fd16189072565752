"""Whether random projections are a way to send sparse weights: compressed sensing beside entropy coding.

Rows of a real matrix, their smallest numbers zero, are sent as fewer random projections than they have
numbers (a Gaussian matrix that both sides draw from a seed, so that it costs nothing), each rounded to
so many bits. The receiver finds the sparsest rows that explain them by subspace pursuit (Dai and
Milenkovic, IEEE Trans. Inf. Theory 55, 2009), being told how many numbers there are. For each share of zeros:
the fewest projections, by bisection, from which 19 of 20 rows come back within 2 % (Euclidean), and the bits
that plain coding takes for the same. The last line is a difference that is not sparse: what rounding leaves.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.hub.resolve import resolve
from fastserve.types import Float64Array, Int64Array
from report import DEFAULT_MODEL, make_parser, publish

WIDTH = 256
TOLERANCE = 0.02
WANTED = 0.95
MOST_ROUNDS = 40
STEPS = 6  # of the bisection: to a 64th of the width


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--tensor", default="model.layers.10.mlp.gate_proj.weight")
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95, 0.98])
    parser.add_argument("--bits", type=int, nargs="+", default=[6, 8], help="of a projection")
    options = parser.parse_args()
    tensor = open_checkpoint(resolve(options.model)).tensors[options.tensor]
    rows_of_model = to_f32(tensor.rows(0, options.rows))[:, :WIDTH].astype(np.float64)
    results: dict[str, Any] = {}
    table: list[tuple[str, object]] = []
    for share in options.zeros:
        num_kept = round((1 - share) * WIDTH)
        found = compare(keep_largest(rows_of_model, num_kept), num_kept, options)
        results[f"{share:.0%} zeros"] = found
        table.append((f"{share:.0%} zeros", tell(found)))
    found = compare(rounding_error(rows_of_model), WIDTH, options)
    results["error of rounding to 4 bits"] = found
    table.append(("error of rounding to 4 bits", tell(found)))
    publish(options, {"random_projections": results}, table)


def compare(rows: Float64Array, num_kept: int, options: argparse.Namespace) -> dict[str, Any]:
    """Bits of an element by projections, the best of all precisions, and plainly at the same error."""
    found = []
    for bits in options.bits:
        count = fewest_projections(rows, num_kept, bits)
        if count is not None:
            found.append((count * bits / WIDTH, count / WIDTH, bits))
    projected_bits, projections, projection_bits = min(found, default=(None, None, None))
    plain_bits, value_bits = code_plainly(rows, num_kept)
    return {
        "projections_of_an_element": projections,
        "bits_of_a_projection": projection_bits,
        "bits_of_an_element": projected_bits,
        "plain_bits_of_an_element": plain_bits,
        "plain_bits_of_a_value": value_bits,
    }


def tell(found: dict[str, Any]) -> str:
    plain = f"plainly {found['plain_bits_of_an_element']:.2f} bits"
    if found["bits_of_an_element"] is None:
        return f"never recovered from fewer projections than numbers; {plain}"
    return (
        f"{found['projections_of_an_element']:.2f} projections of {found['bits_of_a_projection']} bits for"
        f" each number: {found['bits_of_an_element']:.2f} bits; {plain}"
    )


def keep_largest(rows: Float64Array, num_kept: int) -> Float64Array:
    kept = np.argsort(-np.abs(rows), axis=1, kind="stable")[:, :num_kept]  # of a grid: many are equal
    pruned = np.zeros_like(rows)
    np.put_along_axis(pruned, kept, np.take_along_axis(rows, kept, axis=1), axis=1)
    return pruned


def rounding_error(rows: Float64Array) -> Float64Array:
    scales = np.abs(rows).max(axis=1, keepdims=True) / 7.5
    return rows - np.clip(np.rint(rows / scales), -8, 7) * scales


def fewest_projections(rows: Float64Array, num_kept: int, bits: int) -> int | None:
    """Fewer than there are numbers in a row; None where that is not enough."""
    low, high = min(num_kept, WIDTH - 1), WIDTH
    for _ in range(STEPS):
        middle = (low + high) // 2
        if middle < WIDTH and share_recovered(rows, num_kept, middle, bits) >= WANTED:
            high = middle
        else:
            low = middle
    return None if high == WIDTH else high


def share_recovered(rows: Float64Array, num_kept: int, count: int, bits: int) -> float:
    matrix = np.random.default_rng(count).normal(size=(count, WIDTH)) / np.sqrt(count)
    projected = round_uniformly(rows @ matrix.T, bits)
    errors = [
        np.linalg.norm(pursue(matrix, y, num_kept) - row) / np.linalg.norm(row)
        for row, y in zip(rows, projected, strict=True)
    ]
    return float(np.mean(np.array(errors) <= TOLERANCE))


def pursue(matrix: Float64Array, projected: Float64Array, num_kept: int) -> Float64Array:
    """The row of so many numbers that explains what was projected, or where pursuit ends."""
    if num_kept >= matrix.shape[0]:  # the shortest row of those that explain it: nothing more is known
        return np.linalg.lstsq(matrix, projected, rcond=None)[0]
    row = np.zeros(matrix.shape[1])
    residual = projected
    for _ in range(MOST_ROUNDS):
        candidates = np.union1d(np.nonzero(row)[0], largest(matrix.T @ residual, num_kept))
        wide = solve(matrix, projected, candidates[: matrix.shape[0]])
        new = solve(matrix, projected, largest(wide, num_kept))
        left = projected - matrix @ new
        if np.linalg.norm(left) >= np.linalg.norm(residual):
            break
        row, residual = new, left
    return row


def largest(values: Float64Array, count: int) -> Int64Array:
    return np.sort(np.argpartition(np.abs(values), -count)[-count:])


def solve(matrix: Float64Array, projected: Float64Array, support: Int64Array) -> Float64Array:
    """The row with these places that explains best what was projected."""
    row = np.zeros(matrix.shape[1])
    row[support] = np.linalg.lstsq(matrix[:, support], projected, rcond=None)[0]
    return row


def round_uniformly(values: Float64Array, bits: int) -> Float64Array:
    """Each row to 2^bits levels between its extremes."""
    step = 2 * np.abs(values).max(axis=1, keepdims=True) / (2**bits - 1)
    return np.rint(values / step) * step


def code_plainly(rows: Float64Array, num_kept: int) -> tuple[float, int]:
    """Bits of an element where its place is coded by the entropy of places, and its value, rounded to the
    fewest bits that keep the error, by that of values; and those bits."""
    share = num_kept / WIDTH
    places = 0.0 if share == 1 else -share * np.log2(share) - (1 - share) * np.log2(1 - share)
    for bits in range(2, 17):
        rounded = round_uniformly(rows, bits)
        errors = np.linalg.norm(rounded - rows, axis=1) / np.linalg.norm(rows, axis=1)
        if np.mean(errors <= TOLERANCE) >= WANTED:
            step = 2 * np.abs(rows).max(axis=1, keepdims=True) / (2**bits - 1)
            codes = np.rint(rows / step)[rows != 0]
            _, counts = np.unique(codes, return_counts=True)
            shares = counts / codes.size
            return float(places + share * -(shares * np.log2(shares)).sum()), bits
    raise AssertionError("16 bits are not enough")


if __name__ == "__main__":
    main()
