"""The model directory that a run ends in: written beside its place, and renamed there whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastserve.evaluate.task.embedding import Embedding
from fastserve.evaluate.task.task import Task
from fastserve.models.pooling import Pooling
from fastserve.types import JsonObject

SCHEMA_VERSION = 1


def write_artifact(
    output: Path,
    *,
    model: Any,
    tokenizer: Any,
    task: Task,
    lineage: JsonObject,
    metrics: dict[str, float],
    card: str,
    plots: Path | None,
    max_tokens: int | None,
    adapter: Path | None = None,
    prefix: Mapping[str, Any] | None = None,
) -> None:
    """Write what `transformers` and FastServe open: weights, config, tokenizer, `fastserve.json`, and the
    card of the training as README.md, its curves in `training/`.

    `max_tokens` are those that the model takes, of a text to embed at least as many as it was tuned with;
    `adapter` is the folder of an adapter that was merged into the weights, or of a prefix as peft has it; it
    is kept beside them. `prefix` are tensors of a tuned prefix, which go with the model's own.
    """
    written = output.with_name(f"{output.name}.part")
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    if isinstance(task, Embedding):
        model.encoder.save_pretrained(written)
        most = None if max_tokens is None else max(max_tokens, task.max_length)
        _write_pooling(written, model.pooling, model.encoder.config.hidden_size, most)
    elif prefix:
        model.save_pretrained(written, state_dict={**model.state_dict(), **prefix})
    else:
        model.save_pretrained(written)
    tokenizer.save_pretrained(written)
    if adapter is not None:
        shutil.copytree(adapter, written / "adapter")
    if plots is not None and plots.is_dir():
        shutil.copytree(plots, written / "training")
    settings = {
        "schema_version": SCHEMA_VERSION,
        "task": task.name,
        "tag_scheme": None,
        **task.settings(),
        "metrics": metrics,
        "lineage": lineage,
    }
    (written / "README.md").write_text(card, encoding="utf-8")
    (written / "fastserve.json").write_text(
        json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )
    sync_folder(written)
    os.replace(written, output)


def _write_pooling(folder: Path, pooling: Pooling, width: int, max_tokens: int | None) -> None:
    """The files by which sentence-transformers, and FastServe, know how token vectors become one."""
    kinds = ("Transformer", "Pooling", "Normalize") if pooling.normalize else ("Transformer", "Pooling")
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": "" if kind == "Transformer" else f"{index}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(kinds)
    ]
    modes = {"mean": "mean_tokens", "first": "cls_token", "last": "lasttoken"}
    settings = {"word_embedding_dimension": width}
    settings |= {f"pooling_mode_{mode}": kind == pooling.kind for kind, mode in modes.items()}
    (folder / "modules.json").write_text(json.dumps(modules, indent=2), encoding="utf-8")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": max_tokens, "do_lower_case": False}), encoding="utf-8"
    )


def sync_folder(folder: Path) -> None:
    """Have all files on the disk before the folder gets its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
