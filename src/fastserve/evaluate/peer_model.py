"""The same model in the form that a peer opens: weights converted, then quantized by the peer's own tool."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.conversion import ConvertedWeights, Target
from fastserve.checkpoint.convert_checkpoint import convert
from fastserve.evaluate.worker import EngineKind, Worker
from fastserve.models.matrices import find_matrices


def peer_job(
    kind: EngineKind, python: Path, checkpoint: Checkpoint, job: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """The job for a peer: its model, which lies in `folder` where it had to be converted, and threads named.

    Raises:
        MeasurementError: the peer could not prepare the model.
        UnsupportedError: the model cannot be converted.
    """
    from fastserve.backends.native.executable import make_runtime

    peer_folder = folder / kind.name
    peer_folder.mkdir()
    adapted = {**job, "threads": job["threads"] or make_runtime().num_threads}
    if kind.form == "gguf":
        adapted["model"] = str(_as_gguf(checkpoint, peer_folder))
    elif kind.form == "w8a8" and job["weights"] in ("int8", "auto"):
        adapted["model"] = str(_convert(checkpoint, "compressed-tensors", "w8a8", peer_folder))
    elif kind.form in ("folder", "w8a8"):
        adapted["model"] = str(_as_folder(checkpoint, peer_folder))
    if not kind.prepares:
        return adapted
    with Worker(kind, python) as worker:
        return worker.prepare(adapted, peer_folder)


def _as_gguf(checkpoint: Checkpoint, folder: Path) -> Path:
    if checkpoint.path.suffix == ".gguf":
        return checkpoint.path
    return next(_convert(checkpoint, "gguf", "f16", folder).glob("*.gguf"))


def _as_folder(checkpoint: Checkpoint, folder: Path) -> Path:
    if checkpoint.format == "safetensors":
        return checkpoint.path
    return _convert(checkpoint, "safetensors", "bf16", folder)


def _convert(checkpoint: Checkpoint, target: Target, weights: ConvertedWeights, folder: Path) -> Path:
    return convert(checkpoint, target, weights, folder / "model", find_matrices(checkpoint)).output
