"""`fastserve bench make-model`: a model with random weights, for speed work."""

from __future__ import annotations

from pathlib import Path

import click

from fastserve.cli.option import json_option
from fastserve.cli.report import print_json


@click.command("make-model")
@click.option("--like", required=True, metavar="SHAPE", help="llama-3.2-1b, qwen2.5-0.5b, bert-base, ...")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path), help="Where to write it.")
@click.option(
    "--sparsity", type=float, default=0.0, help="Share of zeros in every matrix, those of least magnitude."
)
@json_option
def make_model(like: str, folder: Path, sparsity: float, json: bool) -> None:
    """Write a model with random weights in the shape of a real one: as fast, and of no other use."""
    from fastserve.evaluate.random_model import make_model

    num_parameters = make_model(like, folder, sparsity=sparsity)
    if json:
        result = {"path": str(folder), "like": like, "parameters": num_parameters, "sparsity": sparsity}
        print_json(result)
    else:
        print(f"wrote {num_parameters / 1e6:.1f} million random parameters like {like} to {folder}")
