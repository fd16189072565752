"""Where sparse weights pay: the speed of each storage against dense weights, by format, zeros and rows.

One matrix, read from memory, all kinds in turns, each at its fastest. With --models, whole models instead:
one without zeros and one of the same shape with them, as `fastserve bench make-model` writes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from fastserve.backends.native.executable import make_runtime
from fastserve.backends.native.storage_speed import Trial, measure_speeds
from fastserve.backends.native.weight_scheme import SCHEMES
from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.evaluate.estimate import estimate_ratio
from fastserve.evaluate.worker import FASTSERVE, Worker
from fastserve.evaluate.workload import Decode
from fastserve.models.family import read_config
from report import make_parser, publish

SHARES_OF_ZEROS = (0.0, 0.3, 0.4, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
NUM_ROWS = (1, 8, 128)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--weights", nargs="+", default=["int8", "int4"], choices=sorted(SCHEMES))
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=8192)
    parser.add_argument("--copies", type=int, default=4, help="of the matrix, which come around in turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--seconds", type=float, default=0.6, help="of each kind of linears and number of rows"
    )
    parser.add_argument("--pairs", type=int, default=9, help="of runs of models")
    parser.add_argument("--models", type=Path, nargs=2, metavar=("DENSE", "SPARSE"), help="folders")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8], help="that models decode at once")
    parser.add_argument(
        "--tokens", type=int, default=16, help="that models decode in a run, of each sequence"
    )
    options = parser.parse_args()
    if options.models:
        compare_models(options)
    else:
        compare_linears(options)


def compare_linears(options: argparse.Namespace) -> None:
    runtime = make_runtime(options.threads)
    trial = Trial(width=options.width, depth=options.depth, copies=options.copies, seconds=options.seconds)
    results: dict[str, dict[str, dict[str, dict[int, float]]]] = {}
    rows: list[tuple[str, object]] = []
    for name in options.weights:
        for share in SHARES_OF_ZEROS:
            speeds = measure_speeds(runtime, SCHEMES[name], share, NUM_ROWS, trial=trial)
            results.setdefault(name, {})[str(share)] = {**speeds}
            for storage, by_rows in speeds.items():
                shown = "  ".join(f"{num_rows}: {speed:.2f}" for num_rows, speed in by_rows.items())
                rows.append((f"{name}, {share:.0%} zeros, {storage}", shown))
    publish(options, {"speed_by_format_zeros_storage_rows": results}, rows)


def compare_models(options: argparse.Namespace) -> None:
    """Both models in processes of their own, in turns: the median of the ratios within pairs, and the ratio
    of the fastest runs, which others' work on the machine disturbs least."""
    vocab_size = read_config(open_checkpoint(options.models[0]).config).vocab_size
    results: dict[str, dict[str, object]] = {}
    rows: list[tuple[str, object]] = []
    for name in options.weights:
        with (
            Worker(FASTSERVE, Path(sys.executable)) as dense,
            Worker(FASTSERVE, Path(sys.executable)) as sparse,
        ):
            workers = (dense, sparse)
            for worker, folder in zip(workers, options.models, strict=True):
                worker.open(
                    {
                        "model": str(folder),
                        "weights": name,
                        "threads": options.threads,
                        "context_length": 1024,
                        "max_sequences": 32,
                    }
                )
            for count in options.sequences:
                measure = Decode(count, options.tokens)
                rates: list[list[float]] = [[], []]
                for turn in range(options.pairs + 1):
                    for index in (0, 1) if turn % 2 else (1, 0):
                        rate = measure.run(workers[index], vocab_size)
                        if turn:  # the first warms up
                            rates[index].append(rate)
                ratio = estimate_ratio(rates[1], rates[0])
                fastest = max(rates[1]) / max(rates[0])
                results.setdefault(name, {})[str(count)] = {
                    "dense_tokens_per_second": rates[0],
                    "sparse_tokens_per_second": rates[1],
                    "ratio": asdict(ratio),
                    "ratio_of_fastest": fastest,
                }
                what = f"{name}, {count} at once, sparse to dense"
                rows.append((what, f"{ratio}, fastest {fastest:.3f} of {max(rates[0]):.1f} tokens/s"))
    publish(options, {"models": results}, rows)


if __name__ == "__main__":
    main()
