"""The files of a model beside its weights: copied from a folder, or made from the metadata of a GGUF file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.file import MAX_BYTES
from fastserve.checkpoint.sentence import POOLING_FLAGS
from fastserve.types import JsonObject

# What is weights, in one framework's form or another's, or says where they are.
_WEIGHT_ENDINGS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf",
    ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite", ".npz",
)  # fmt: skip
_WRITTEN_ANEW = ("config.json",)


def write_model_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Write tokenizer, chat template, generation settings and what sentence-transformers needs.

    Raises:
        CheckpointError, UnsupportedError: the tokenizer of a GGUF file cannot be read.
    """
    if checkpoint.metadata is None:
        for path in _small_files(checkpoint.path):
            target = folder / path.relative_to(checkpoint.path)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        return
    from fastserve.checkpoint.gguf_tokenizer import build_from_gguf

    backend, roles = build_from_gguf(checkpoint.metadata)
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    context = checkpoint.config.get("max_position_embeddings")
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context}
    _write_json(folder / "tokenizer_config.json", {**kind, **roles})
    if checkpoint.eos_token_ids:
        _write_json(folder / "generation_config.json", {"eos_token_id": list(checkpoint.eos_token_ids)})
    if checkpoint.chat_template is not None:
        (folder / "chat_template.jinja").write_text(checkpoint.chat_template, encoding="utf-8")
    if checkpoint.sentence is not None:
        _write_sentence_files(checkpoint, folder)


def _small_files(folder: Path) -> Iterator[Path]:
    """Of the folder and the folders in it: those of weights in other forms have no place in the new one."""
    for path in sorted([*folder.iterdir(), *folder.glob("*_*/*.json")]):
        is_wanted = path.is_file() and not path.name.endswith(_WEIGHT_ENDINGS)
        is_hidden = path.relative_to(folder).as_posix().startswith(".")
        is_written_anew = path.parent == folder and path.name in _WRITTEN_ANEW
        if is_wanted and not is_hidden and not is_written_anew and path.stat().st_size <= MAX_BYTES:
            yield path


def _write_sentence_files(checkpoint: Checkpoint, folder: Path) -> None:
    assert checkpoint.sentence is not None
    names = [str(module["type"]).rsplit(".", 1)[-1] for module in checkpoint.sentence.modules]
    paths = ["" if name == "Transformer" else f"{index}_{name}" for index, name in enumerate(names)]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
        for index, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    pooling = folder / paths[names.index("Pooling")]
    pooling.mkdir()
    mode = checkpoint.sentence.pooling.get("pooling_mode")
    settings = {flag: kind == mode for kind, flag in POOLING_FLAGS.items()}
    _write_json(
        pooling / "config.json", {"word_embedding_dimension": checkpoint.config["hidden_size"], **settings}
    )


def _write_json(path: Path, document: JsonObject) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
