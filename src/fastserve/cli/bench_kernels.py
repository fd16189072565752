"""`fastserve bench kernels`: how fast every kernel is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

import click

from fastserve.cli.option import json_option
from fastserve.cli.report import print_json, print_table
from fastserve.config import WeightFormat

if TYPE_CHECKING:
    from fastserve.evaluate.kernel_speed import KernelSpeed

# What a matrix can be packed as; `stored` is whatever the file has.
FORMATS = tuple(name for name in get_args(WeightFormat) if name != "stored")


@click.command()
@click.option(
    "--like", multiple=True, metavar="SHAPE", default=("llama-3.2-1b", "smollm2-135m"), help="Of which model."
)
@click.option("--weights", "formats", multiple=True, type=click.Choice(FORMATS), help="By default all.")
@click.option(
    "--rows",
    multiple=True,
    type=click.IntRange(1, 4096),
    default=(1, 8, 32, 128, 512),
    help="Of activations.",
)
@click.option("--threads", type=int, help="By default one for each core that this process may use.")
@json_option
def kernels(
    like: Sequence[str], formats: Sequence[WeightFormat], rows: Sequence[int], threads: int | None, json: bool
) -> None:
    """Measure every linear shape in every weight format, then the other ops, against the machine's limits;
    then linears of sparse weights, against dense ones."""
    from fastserve.evaluate.kernel_speed import linear_shapes, measure_linears, measure_ops, measure_sparse

    shapes = list(dict.fromkeys(size for shape in like for size in linear_shapes(shape)))
    limits, speeds = measure_linears(shapes, formats or FORMATS, rows=rows, threads=threads)
    speeds += (speed for shape in like for speed in measure_ops(shape, limits))
    sparse = measure_sparse(formats or ("int8", "int4"), threads=threads)
    if json:
        print_json(
            {
                "limits": limits.to_json(),
                "kernels": [speed.to_json() for speed in speeds],
                "sparse": [speed.to_json() for speed in sparse],
            }
        )
        return
    print(
        f"{limits.isa}, {limits.threads} threads: {limits.read_bytes_per_second / 1e9:.1f} GB/s, "
        f"{limits.int8_operations_per_second / 1e12:.2f} TOP/s int8, "
        f"{limits.f32_operations_per_second / 1e12:.2f} TFLOP/s f32"
    )
    header = ("op", "shape", "weights", "rows", "us", "GB/s", "of read", "TOP/s", "of peak")
    print_table(header, [_row(speed) for speed in speeds])
    if sparse:
        print()
        print_table(
            ("op", "weights", "zeros", "storage", "rows", "times dense"),
            [
                (s.op, s.weights, f"{s.zeros:.0%}", s.storage, str(s.rows), f"{s.times_dense:.2f}")
                for s in sparse
            ],
        )


def _row(speed: KernelSpeed) -> tuple[str, ...]:
    return (
        speed.op,
        speed.shape,
        speed.weights,
        str(speed.rows),
        f"{speed.seconds * 1e6:.1f}",
        f"{speed.bytes_per_second / 1e9:.1f}",
        f"{speed.share_of_read:.0%}",
        f"{speed.operations_per_second / 1e12:.3f}",
        f"{speed.share_of_operations:.0%}",
    )
