"""`fastserve convert`: write a model in another format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from fastserve.checkpoint.conversion import ConvertedWeights, Target
from fastserve.cli.option import json_option, offline_option
from fastserve.cli.report import format_bytes, print_json

if TYPE_CHECKING:
    from fastserve.checkpoint.checkpoint import Checkpoint
    from fastserve.checkpoint.conversion import Matrices


@click.command()
@click.argument(
    "source",
    metavar="SOURCE",
    help="A name that `fastserve models list` shows, a source, a folder or a .gguf file.",
)
@click.option(
    "--to",
    "target",
    type=click.Choice(get_args(Target)),
    required=True,
    help="Plain numbers, whole numbers with scales for transformers and vLLM, or one file for llama.cpp.",
)
@click.option(
    "--weights",
    type=click.Choice(get_args(ConvertedWeights)),
    default="auto",
    help="What matrices become. auto keeps them as they are stored where the format holds that; it makes "
    "int8 of plain numbers for compressed-tensors, and bf16 of blocks for safetensors.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="The folder to write, which is not there yet.",
)
@json_option
@offline_option
def convert(
    source: str, target: Target, weights: ConvertedWeights, output: Path, json: bool, offline: bool
) -> None:
    """Write a model in another format.

    What is stored as whole numbers with scales is moved where the new format holds it, and rounded anew where
    it does not; lines say how many tensors became what. Tokenizer, templates and settings come along.
    """
    from fastserve.checkpoint.checkpoint import open_checkpoint
    from fastserve.checkpoint.convert_checkpoint import convert as convert_checkpoint
    from fastserve.cli.progress_bar import download_progress
    from fastserve.hub.resolve import resolve

    with download_progress(shown=not json) as progress:
        path = resolve(source, offline=offline, progress=progress)
    checkpoint = open_checkpoint(path)
    conversion = convert_checkpoint(checkpoint, target, weights, output, _find_matrices(checkpoint, target))
    if json:
        changes = [
            {"tensors": count, "change": change, "reason": reason or None}
            for (change, reason), count in conversion.changes.most_common()
        ]
        size = {"size_bytes": conversion.num_bytes}
        print_json({"source": str(path), "output": str(output), "to": target, **size, "changes": changes})
        return
    for line in conversion.lines:
        print(line)
    print(f"{output}: {format_bytes(conversion.num_bytes)}")


def _find_matrices(checkpoint: Checkpoint, target: Target) -> Matrices:
    """Those of the model's graph; plain numbers need none, so that models are written that we cannot run."""
    from fastserve.checkpoint.conversion import Matrices
    from fastserve.graph.node import Embedding, Linear
    from fastserve.models.family import build_graph, read_config

    if target == "safetensors":
        return Matrices()
    graph = build_graph(read_config(checkpoint.config), checkpoint.tensors.keys())
    embeddings = [node for node in graph.nodes if isinstance(node, Embedding)]
    tables = {node.weight for node in embeddings if node.ids == "token_ids"}
    multiplied = [node for node in graph.nodes if isinstance(node, Linear)]
    tables |= {node.weight for node in multiplied if node.out == graph.outputs.get("logits")}
    linears = {node.weight for node in multiplied} - tables
    return Matrices(
        linears=frozenset(name for weight in linears for name in weight.names),
        tables=frozenset(name for weight in tables for name in weight.names),
    )
