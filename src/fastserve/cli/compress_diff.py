"""`fastserve compress diff`: where two models differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastserve.cli.option import json_option, offline_option
from fastserve.cli.progress_bar import download_progress, step_progress
from fastserve.cli.report import print_json, print_table

if TYPE_CHECKING:
    from fastserve.compress.difference import ModelDifference


@click.command()
@click.argument("one", metavar="A", help="A name, a source, a folder or a .gguf file; exact numbers count.")
@click.argument("other", metavar="B", help="Another, as it is served.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Text, or rows of the models' task: outputs of layers, predictions and answers are compared on it.",
)
@click.option("--limit", type=click.IntRange(1), help="Only so many rows, or windows of 512 tokens.")
@click.option("--threads", type=click.IntRange(1), help="Of the runtime; by default as many as cores.")
@json_option
@offline_option
def compress_diff(
    one: str, other: str, data: Path | None, limit: int | None, threads: int | None, json: bool, offline: bool
) -> None:
    """Show where two models differ: by layer, by token, and in the answers that flip."""
    from fastserve.compress.difference import find_differences
    from fastserve.compress.precondition import check_libraries
    from fastserve.hub.resolve import resolve

    check_libraries()
    with download_progress(shown=not json) as progress:
        first, second = (resolve(name, offline=offline, progress=progress) for name in (one, other))
    with step_progress(shown=not json) as steps:
        found = find_differences(first, second, data, limit=limit, threads=threads, progress=steps)
    if json:
        print_json({"one": one, "other": other, **found.to_json()})
    else:
        _print(found)


def _print(found: ModelDifference) -> None:
    print_table(
        ["matrix", "A", "B", "weights", "outputs"],
        [
            [layer.name, layer.stored, layer.other_stored, _share(layer.weights), _share(layer.outputs)]
            for layer in found.layers
        ],
    )
    for kind, names in (("A", found.only), ("B", found.other_only)):
        if names:
            print(
                f"only {kind} has {len(names)} tensors: {', '.join(names[:3])}{', ...' if names[3:] else ''}"
            )
    if found.judged_by is None:
        return
    print(f"\non {found.judged_by}:")
    print_table(
        ["figure", "value", "95 % interval"],
        [[name, f"{i.value:.4f}", f"{i.low:.4f} to {i.high:.4f}"] for name, i in found.figures.items()],
    )
    if found.tokens:
        print(f"\n{found.num_flips} clear predictions flip; the furthest apart:")
        print_table(
            ["KL", "A says", "B says", "follows", "after"],
            [
                [f"{t.kl:.3f}", repr(t.predicted), repr(t.other_predicted), repr(t.follows), repr(t.before)]
                for t in found.tokens
            ],
        )
    elif found.flips:
        print(f"\n{found.num_flips} answers flip:")
        print_table(
            ["row", "right", "A says", "B says", "text"],
            [[flip.place, flip.right, flip.answer, flip.other_answer, flip.text] for flip in found.flips],
        )
    else:
        print("\nno answer flips")


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4%}"
