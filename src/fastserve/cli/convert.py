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
    "int8 of plain numbers for compressed-tensors, and bf16 of blocks for safetensors. w8a8 is int8 that "
    "meets activations of int8, which vLLM on CPUs is fastest with and which loses more.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="The folder to write, which is not there yet.",
)
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Add the LoRA or DoRA adapter in this folder, as peft saves them. Matrices that it changes become "
    "f32 unless --weights says otherwise.",
)
@click.option(
    "--allow-pickle",
    is_flag=True,
    help="SOURCE is a folder with pytorch_model.bin: read it through PyTorch's loader of weights alone.",
)
@json_option
@offline_option
def convert(
    source: str,
    target: Target,
    weights: ConvertedWeights,
    output: Path,
    adapter: Path | None,
    allow_pickle: bool,
    json: bool,
    offline: bool,
) -> None:
    """Write a model in another format.

    What is stored as whole numbers with scales is moved where the new format holds it, and rounded anew where
    it does not; lines say how many tensors became what. Tokenizer, templates and settings come along.
    """
    from fastserve.checkpoint.adapter import merge_adapter, open_adapter
    from fastserve.checkpoint.conversion import Matrices
    from fastserve.checkpoint.convert_checkpoint import convert as convert_checkpoint
    from fastserve.compress.prune.heads import with_all_heads
    from fastserve.compress.step import WorkingModel
    from fastserve.models.matrices import find_matrices

    checkpoint = _open_pickled(source) if allow_pickle else _open(source, offline=offline, shown=not json)
    if adapter is not None:
        checkpoint = merge_adapter(checkpoint, open_adapter(adapter.expanduser()))
    padded = with_all_heads(WorkingModel(checkpoint=checkpoint)).checkpoint
    num_padded = 0
    if padded is not checkpoint:
        num_padded = sum(t.shape != checkpoint.tensors[name].shape for name, t in padded.tensors.items())
        checkpoint = padded
    # Plain numbers need no graph: models are written that we cannot run.
    matrices = Matrices() if target == "safetensors" else find_matrices(checkpoint)
    conversion = convert_checkpoint(checkpoint, target, weights, output, matrices)
    if num_padded:
        why = "an encoder's config has no key for fewer heads, but in FastServe"
        conversion.changes["given zeros in place of heads that were pruned", why] += num_padded
    if json:
        changes = [
            {"tensors": count, "change": change, "reason": reason or None}
            for (change, reason), count in conversion.changes.most_common()
        ]
        size = {"size_bytes": conversion.num_bytes}
        print_json(
            {"source": str(checkpoint.path), "output": str(output), "to": target, **size, "changes": changes}
        )
        return
    for line in conversion.lines:
        print(line)
    print(f"{output}: {format_bytes(conversion.num_bytes)}")


def _open(source: str, *, offline: bool, shown: bool) -> Checkpoint:
    from fastserve.checkpoint.checkpoint import open_checkpoint
    from fastserve.cli.progress_bar import download_progress
    from fastserve.hub.resolve import resolve

    with download_progress(shown=shown) as progress:
        path = resolve(source, offline=offline, progress=progress)
    return open_checkpoint(path)


def _open_pickled(source: str) -> Checkpoint:
    from fastserve.errors import ModelNotFoundError
    from fastserve.tune.pickled_checkpoint import open_pickled

    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise ModelNotFoundError(
            f"{source} is no folder", hint="--allow-pickle opens folders: download the model first"
        )
    return open_pickled(folder)
