"""`fastserve bench model`: how fast a whole model is, alone and against peers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastserve.cli.engine_option import engine_options, model_argument
from fastserve.cli.option import json_option, offline_option
from fastserve.cli.report import format_bytes, print_json, print_table
from fastserve.config import EngineOptions

if TYPE_CHECKING:
    from fastserve.evaluate.model_speed import ModelSpeed


@click.command()
@model_argument
@engine_options("weights", "threads", "kv_memory", "kv_spill", "spill_dir")
@click.option(
    "--compare",
    metavar="PEER,...",
    help="llama.cpp, openvino, transformers, vllm, onnxruntime: run in turns with us.",
)
@click.option(
    "--peer-python",
    "peer_pythons",
    multiple=True,
    type=click.Path(path_type=Path),
    help="An interpreter that may have peers; may be given several times. By default this one.",
)
@click.option("--pairs", type=click.IntRange(1), default=7, help="Runs of every measure and engine.")
@click.option(
    "--only", metavar="MEASURE,...", help="Beginnings of names of measures, such as decode_1,prefill."
)
@click.option("--profile", is_flag=True, help="Also show where the time of a run goes, op by op.")
@json_option
@offline_option
def model(
    model: str,
    options: EngineOptions,
    compare: str | None,
    peer_pythons: tuple[Path, ...],
    pairs: int,
    only: str | None,
    profile: bool,
    json: bool,
    offline: bool,
) -> None:
    """Measure a model in fresh processes: prompts, decoding, many requests, start and memory.

    Peers run interleaved with FastServe, on the same prompts, bits and threads; a ratio is the median of
    those within pairs, with the bounds of its 95 % bootstrap interval. A share of a limit above 100 % is an
    error: something was measured wrongly.
    """
    from fastserve.evaluate.model_speed import SpeedOptions, measure_model
    from fastserve.evaluate.worker import find_peers
    from fastserve.hub.resolve import resolve

    speed = measure_model(
        resolve(model, offline=offline),
        SpeedOptions(
            weights=options.weights,
            threads=options.threads,
            kv_memory=options.kv_memory,
            kv_spill=options.kv_spill,
            spill_dir=options.spill_dir,
            pairs=pairs,
            only=only.split(",") if only else (),
            peers=find_peers(compare.split(",") if compare else (), peer_pythons),
            is_profiled=profile,
        ),
        name=Path(model).name,  # of a folder
    )
    if json:
        print_json(speed.to_json())
    else:
        _print_speed(speed)


def _print_speed(speed: ModelSpeed) -> None:
    from fastserve.evaluate.profile import PROFILE_HEADER, profile_rows

    limits = speed.limits
    print(f"{speed.model}, weights {speed.options.weights}, {limits.threads} threads, {limits.isa}")
    working_set = format_bytes(limits.working_set_bytes)
    print(
        f"limits: {limits.read_bytes_per_second / 1e9:.1f} GB/s of {working_set}, "
        f"{limits.int8_operations_per_second / 1e12:.2f} TOP/s int8"
    )
    for name, peer in speed.peers.items():
        cosine = "" if peer.cosine is None else f", embeddings {peer.cosine:.3f} alike ours"
        print(f"{name} {peer.version}: weights {peer.weights}{cosine}")
    for name, reason in speed.left_out.items():
        print(f"{name} is left out: it {reason}")
    ratios = {name: speed.ratios(name) for name in speed.peers}
    rows = []
    for measure in speed.ours.rates:
        row = [measure.replace("_", " "), f"{speed.ours.median(measure):.4g}"]
        for name, peer in speed.peers.items():
            ratio = ratios[name][measure]
            row += [f"{peer.median(measure):.4g}", f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"]
        rows.append(row)
    engines = [speed.ours, *speed.peers.values()]
    rows.append(
        _row("start to first token, seconds", [f"{e.start.first_token_seconds:.2f}" for e in engines])
    )
    rows.append(_row("peak memory", [format_bytes(e.start.peak_memory_bytes) for e in engines]))
    rows += [[name.replace("_", " "), f"{share:.1%}"] for name, share in speed.shares.items()]
    header = ["measure", "fastserve", *(cell for name in speed.peers for cell in (name, "ratio"))]
    print_table(header, [row + [""] * (len(header) - len(row)) for row in rows])
    if speed.profile:
        print()
        print_table(PROFILE_HEADER, profile_rows(speed.profile, limits))


def _row(name: str, cells: list[str]) -> list[str]:
    """Our cell, then those of the peers, which have no ratio."""
    ours, *theirs = cells
    return [name, ours, *(part for cell in theirs for part in (cell, ""))]
