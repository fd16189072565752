"""How much faster a model with half of its weights zero decodes than one with none: int8, end to end.

Both are models of random weights in a shape of `fastserve bench make-model`, rounded to int8 by rows and
packed (`fastserve.safetensors`); the sparse one is pruned by magnitude first, linears and the tied embedding
alike unless --linears-only. They run in processes of their own, in turns, with `--weights auto`: whether
sparse kernels run is what measuring on this machine says.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.packed_weights import PACKED_FILE
from fastserve.evaluate.estimate import estimate_ratio
from fastserve.evaluate.random_model import shape_config, write_random_model
from fastserve.evaluate.worker import FASTSERVE, Worker
from fastserve.evaluate.workload import Decode
from fastserve.models.family import read_config
from pruned_model import Rounding, write_pruned
from report import make_parser, publish

INT8_ROWS = Rounding(8, 0)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--like", default="llama-3.2-1b")
    parser.add_argument("--zeros", type=float, default=0.5)
    parser.add_argument("--linears-only", action="store_true")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=16, help="of a run")
    parser.add_argument("--models", type=Path, help="a folder that keeps both models, or has them")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = make_models(options, options.models or Path(scratch))
        results, rows = compare(options, folders)
    publish(options, results, rows)


def make_models(options: Any, folder: Path) -> tuple[Path, Path]:
    """The dense and the sparse model."""
    dense, sparse = folder / f"{options.like}-dense", folder / f"{options.like}-sparse"
    for target, zeros in ((dense, 0.0), (sparse, options.zeros)):
        if target.exists():
            continue
        source = folder / "source"
        in_tables = 0.0 if options.linears_only else zeros
        write_random_model(shape_config(options.like), source, sparsity=in_tables)
        write_pruned(open_checkpoint(source), target, zeros=zeros, linears=INT8_ROWS, tables=INT8_ROWS)
        shutil.rmtree(source)
    return dense, sparse


def compare(options: Any, folders: tuple[Path, Path]) -> tuple[dict[str, Any], list[tuple[str, object]]]:
    vocab_size = read_config(open_checkpoint(folders[0]).config).vocab_size
    measure = Decode(1, options.tokens)
    rates: list[list[float]] = [[], []]
    with Worker(FASTSERVE, Path(sys.executable)) as dense, Worker(FASTSERVE, Path(sys.executable)) as sparse:
        workers = (dense, sparse)
        for worker, folder in zip(workers, folders, strict=True):
            worker.open(
                {
                    "model": str(folder),
                    "weights": "auto",
                    "threads": options.threads,
                    "context_length": 512,
                    "max_sequences": 1,
                }
            )
        for turn in range(options.pairs + 1):
            for index in (0, 1) if turn % 2 else (1, 0):
                rate = measure.run(workers[index], vocab_size)
                if turn:  # the first warms up
                    rates[index].append(rate)
    ratio = estimate_ratio(rates[1], rates[0])
    fastest = max(rates[1]) / max(rates[0])
    sizes = [(folder / PACKED_FILE).stat().st_size for folder in folders]
    files = {"dense": sizes[0], "sparse": sizes[1]}
    results = {
        "dense_tokens_per_second": rates[0],
        "sparse_tokens_per_second": rates[1],
        "ratio": asdict(ratio),
        "ratio_of_fastest": fastest,
        "packed_bytes": files,
    }
    what = f"{options.like}, int8, {options.zeros:.0%} zeros, decoding, sparse to dense"
    shown = f"{ratio}, fastest {fastest:.3f} of {max(rates[0]):.1f} tokens/s"
    packed = f"{sizes[1] / 1e6:.0f} of {sizes[0] / 1e6:.0f} MB"
    return results, [(what, shown), ("packed weights", packed)]


if __name__ == "__main__":
    main()
