"""Writes a model in another format: whole numbers and scales are moved where it holds them, and what is
rounded or dequantized is told. Some rows are in memory at a time, or one matrix of queries or keys.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.conversion import Conversion, ConvertedWeights, Matrices, Target
from fastserve.checkpoint.to_compressed_tensors import to_compressed_tensors
from fastserve.checkpoint.to_gguf import to_gguf
from fastserve.checkpoint.to_safetensors import to_safetensors
from fastserve.errors import OptionError
from fastserve.hub.disk import flush_to_disk
from fastserve.option import check_choice

_Writer = Callable[[Checkpoint, ConvertedWeights, Path, Matrices, Conversion], None]
_WRITERS: Mapping[Target, _Writer] = {
    "safetensors": to_safetensors,
    "compressed-tensors": to_compressed_tensors,
    "gguf": to_gguf,
}


def convert(
    checkpoint: Checkpoint, target: Target, weights: ConvertedWeights, output: Path, matrices: Matrices
) -> Conversion:
    """Write a model as `target` into the folder `output`, which appears whole or not at all.

    `weights` says what matrices become; `auto` keeps them as they are stored where the target holds that.
    What is stored as whole numbers of no more bits than asked for is moved, not rounded again.

    Raises:
        OptionError: the target has no such weights, or `output` is there and not empty.
        UnsupportedError: the model, or its tokenizer, cannot be written so.
        CheckpointError: the model's files contradict each other.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OptionError(f"{output} is not an empty folder", hint="name one that is not there yet")
    check_choice("weights", weights, get_args(ConvertedWeights))
    check_choice("to", target, get_args(Target))
    conversion = Conversion(output, target)
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        _WRITERS[target](checkpoint, weights, folder, matrices, conversion)
        conversion.num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        flush_to_disk([*(path for path in folder.rglob("*")), folder])
        folder.chmod(0o755)
        if output.is_dir():
            output.rmdir()
        folder.rename(output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return conversion
