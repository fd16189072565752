"""What an archive of a model with half of its weights zero and 4 bits takes, beside its entropy and bfloat16.

Linears are pruned by magnitude and rounded to nearest, embeddings and the head rounded alone; quality is not
looked at here. A model of the catalogue, or with --like one of random weights in a shape of
`fastserve bench make-model`.
"""

from __future__ import annotations

import math
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from fastserve.checkpoint.archive import ArchiveSizes, write_archive
from fastserve.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastserve.evaluate.random_model import shape_config, write_random_model
from fastserve.hub.resolve import resolve
from fastserve.models.matrices import find_matrices
from pruned_model import Rounding, write_pruned
from report import DEFAULT_MODEL, make_parser, publish

CASES = {
    "int4 g64, tables int8 rows": (Rounding(4, 64), Rounding(8, 0)),
    "int4 g128, tables int8 rows": (Rounding(4, 128), Rounding(8, 0)),
    "int4 g64, tables int4 g64": (Rounding(4, 64), Rounding(4, 64)),
    "int4 g128, tables int4 g64": (Rounding(4, 128), Rounding(4, 64)),
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--like", help="a shape instead of a model, such as 1b")
    parser.add_argument("--zeros", type=float, default=0.5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    results: dict[str, Any] = {}
    rows: list[tuple[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        if options.like:
            write_random_model(shape_config(options.like), source)
        else:
            source = resolve(options.model)
        os.environ["FASTSERVE_HOME"] = str(Path(scratch) / "store")  # where archives are expanded
        checkpoint = open_checkpoint(source)
        for name in options.cases:
            linears, tables = CASES[name]
            folder = Path(scratch) / str(len(results))
            sizes = write_pruned(
                checkpoint, folder / "model", zeros=options.zeros, linears=linears, tables=tables
            )
            found = measure(folder, checkpoint)
            results[name] = {**found, "sidecar_bytes": sizes.file_bytes}
            rows.append(
                (
                    name,
                    f"linears {found['linears_bits']:.3f} bits (entropy {found['linears_entropy_bits']:.3f}),"
                    f" {found['linears_ratio']:.2f} x smaller than bf16; model {found['model_ratio']:.2f} x,"
                    f" {found['over_entropy']:.2%} over the entropy; a core writes it at"
                    f" {found['write_megabytes_per_second']:.0f} MB/s of packed weights, expands it at"
                    f" {found['expand_megabytes_per_second']:.0f}",
                )
            )
    rows.append(("most memory", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB"))
    publish(options, {"archives": results}, rows)


def measure(folder: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    start = time.process_time()  # one thread: what else runs on the machine does not count
    sizes = write_archive(folder / "model", folder / "archive")
    write_seconds = time.process_time() - start
    start = time.process_time()
    open_checkpoint(folder / "archive")
    expand_seconds = time.process_time() - start
    linears = find_matrices(checkpoint).linears
    coded, entropy = (of_linears(sizes, linears, field) for field in ("coded_bits", "entropy_bits"))
    return {
        "linears_bits": coded,
        "linears_entropy_bits": entropy,
        "linears_ratio": 16 / coded,
        "model_ratio": sizes.bf16_bytes / sizes.file_bytes,
        "over_entropy": sizes.file_bytes / sizes.entropy_bytes - 1,
        "archive_bytes": sizes.file_bytes,
        "entropy_bytes": sizes.entropy_bytes,
        "source_bytes": sizes.source_bytes,
        "bf16_bytes": sizes.bf16_bytes,
        "write_megabytes_per_second": sizes.source_bytes / write_seconds / 1e6,
        "expand_megabytes_per_second": sizes.source_bytes / expand_seconds / 1e6,
    }


def of_linears(sizes: ArchiveSizes, linears: object, field: str) -> float:
    """Bits of an element, of all linears together."""
    weights = [weight for weight in sizes.weights if weight.name in linears]  # type: ignore[operator]
    counts = [math.prod(weight.shape) for weight in weights]
    bits = sum(getattr(weight, field) * count for weight, count in zip(weights, counts, strict=True))
    return bits / sum(counts)


if __name__ == "__main__":
    main()
