"""`fastserve convert`: write a model in another format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from fastserve.checkpoint.conversion import ConvertedWeights, Target
from fastserve.cli.option import json_option, offline_option
from fastserve.cli.report import format_bytes, print_json
from fastserve.errors import OptionError

if TYPE_CHECKING:
    from fastserve.checkpoint.checkpoint import Checkpoint
    from fastserve.compress.quantize.w8a8 import Prepared


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
    "meets activations of int8, but for those matrices that would lose most by it; needs the extra [tune].",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Text, or rows of any task, that show w8a8 what activations are like. Without it the model writes "
    "texts itself; an encoder is shown random tokens.",
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
    calibration: Path | None,
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
    prepared = None
    if (
        weights == "w8a8"
        and target == "compressed-tensors"
        and not checkpoint.config.get("is_encoder_decoder")
    ):
        prepared = _prepare_w8a8(checkpoint, calibration, shown=not json)
        checkpoint = prepared.checkpoint
        matrices = replace(matrices, float_activations=prepared.float_activations)
    elif calibration is not None:
        raise OptionError(
            "--calibration is for --to compressed-tensors --weights w8a8, and not of encoder-decoders",
            hint="leave it out",
            option="calibration",
        )
    conversion = convert_checkpoint(checkpoint, target, weights, output, matrices)
    if prepared is not None:
        conversion.remarks.append(prepared.line)
    if num_padded:
        why = "an encoder's config has no key for fewer heads, but in FastServe"
        conversion.changes["given zeros in place of heads that were pruned", why] += num_padded
    if json:
        changes = [
            {"tensors": count, "change": change, "reason": reason or None}
            for (change, reason), count in conversion.changes.most_common()
        ]
        size = {"size_bytes": conversion.num_bytes}
        told = {"changes": changes, "remarks": conversion.remarks}
        print_json({"source": str(checkpoint.path), "output": str(output), "to": target, **size, **told})
        return
    for line in conversion.lines:
        print(line)
    print(f"{output}: {format_bytes(conversion.num_bytes)}")


def _prepare_w8a8(checkpoint: Checkpoint, calibration: Path | None, *, shown: bool) -> Prepared:
    from fastserve.cli.progress_bar import step_progress
    from fastserve.compress.precondition import check_libraries

    check_libraries()
    from fastserve.compress.calibration_text import calibration_tokens
    from fastserve.compress.quantize.w8a8 import LENGTH, NUM_SEQUENCES, prepare_w8a8, sample_texts

    if calibration is None:
        sequences = sample_texts(checkpoint.path, checkpoint)
    else:
        sequences = calibration_tokens(
            checkpoint, calibration, num_sequences=NUM_SEQUENCES, length=LENGTH, seed=0
        )
    with step_progress(shown=shown) as progress:
        return prepare_w8a8(checkpoint, sequences, progress=progress)


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
