"""The same model in the form that a peer opens: weights converted, then quantized by the peer's own tool."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.gguf_tokenizer import build_from_gguf
from fastserve.evaluate.gguf_writer import write_gguf
from fastserve.evaluate.model_folder import write_model_folder
from fastserve.evaluate.w8a8_writer import write_w8a8
from fastserve.evaluate.worker import EngineKind, Worker
from fastserve.types import Float32Array


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
        adapted["model"] = str(peer_folder / "w8a8")
        write_w8a8(checkpoint, _read_tokenizer(checkpoint), peer_folder / "w8a8")
    elif kind.form in ("folder", "w8a8"):
        adapted["model"] = str(_as_folder(checkpoint, peer_folder))
    if not kind.prepares:
        return adapted
    with Worker(kind, python) as worker:
        return worker.prepare(adapted, peer_folder)


def _as_gguf(checkpoint: Checkpoint, folder: Path) -> Path:
    if checkpoint.path.suffix == ".gguf":
        return checkpoint.path
    path = folder / "model.gguf"
    write_gguf(checkpoint, path)
    return path


def _as_folder(checkpoint: Checkpoint, folder: Path) -> Path:
    if checkpoint.format == "safetensors":
        return checkpoint.path
    shapes = {name: checkpoint.tensors[name].shape for name in checkpoint.tensors}

    def blocks(name: str) -> Iterator[Float32Array]:
        yield to_f32(checkpoint.tensors[name])

    config = {"architectures": ["LlamaForCausalLM"], **checkpoint.config}
    write_model_folder(folder / "model", config, _read_tokenizer(checkpoint), shapes, blocks)
    return folder / "model"


def _read_tokenizer(checkpoint: Checkpoint) -> str:
    """The text of tokenizer.json."""
    if checkpoint.metadata is None:
        return (checkpoint.path / "tokenizer.json").read_text(encoding="utf-8")
    return str(build_from_gguf(checkpoint.metadata)[0].to_str())
