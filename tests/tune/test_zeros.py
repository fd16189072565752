"""Masked fine-tuning: what is 0 in a pruned model stays 0."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastserve.errors import OptionError
from fastserve.tune import TuneOptions, tune
from tune.conftest import film_rows

WriteRows = Callable[[str, list[dict[str, Any]]], Path]
OPTIONS = TuneOptions(
    epochs=3, batch_size=8, learning_rate=5e-3, device="cpu", max_length=32, keep_zeros=True, weight_decay=0.1
)


@pytest.fixture
def pruned_encoder(tiny_encoder: Path, tmp_path: Path) -> Path:
    """The tiny encoder with half of its matrices' entries set to 0."""
    folder = tmp_path / "pruned"
    shutil.copytree(tiny_encoder, folder)
    rng = np.random.default_rng(0)
    weights = load_file(folder / "model.safetensors")
    weights = {
        name: np.where(rng.random(values.shape) < 0.5, np.float32(0), values) if values.ndim == 2 else values
        for name, values in weights.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tuned(model: Path, train: Path, output: Path, options: TuneOptions, **more: Any) -> dict[str, Any]:
    result = tune(
        "text-classification", model=str(model), train=train, output=output, options=options, **more
    )
    return load_file(result.path / "model.safetensors")


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_zeros_stay_zeros_under_every_optimizer_while_the_other_entries_learn(
    pruned_encoder: Path, write_rows: WriteRows, tmp_path: Path, optimizer: Any
) -> None:
    before = load_file(pruned_encoder / "model.safetensors")
    after = tuned(
        pruned_encoder,
        write_rows("train", film_rows(32)),
        tmp_path / "out",
        replace(OPTIONS, optimizer=optimizer),
    )
    matrices = [name for name, values in before.items() if "encoder.layer" in name and values.ndim == 2]
    assert len(matrices) == 12
    for name in matrices:
        zeros = before[name] == 0
        assert not after[f"bert.{name}"][zeros].any(), name
        assert (after[f"bert.{name}"][~zeros] != before[name][~zeros]).mean() > 0.9, name


def test_without_the_option_pruned_entries_learn_again(
    pruned_encoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    train = write_rows("train", film_rows(32))
    after = tuned(pruned_encoder, train, tmp_path / "out", replace(OPTIONS, keep_zeros=False))
    assert (after["bert.encoder.layer.0.output.dense.weight"] == 0).mean() < 0.01


def test_a_resumed_run_keeps_the_source_s_zeros_and_ends_in_the_same_weights(
    pruned_encoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    train, dev = write_rows("train", film_rows(32)), write_rows("dev", [{"text": "yes, good", "label": "y"}])
    whole = tuned(pruned_encoder, train, tmp_path / "whole", OPTIONS, dev=dev)

    def stop(step: int, metrics: dict[str, float]) -> None:
        if step == 8:  # a checkpoint of the first epoch lies there
            raise InterruptedError

    with pytest.raises(InterruptedError):
        tuned(pruned_encoder, train, tmp_path / "out", OPTIONS, dev=dev, on_evaluate=stop)
    checkpoint = tmp_path / "out.run" / "checkpoints" / "checkpoint-4" / "model.safetensors"
    assert checkpoint.is_file()
    resumed = tuned(pruned_encoder, train, tmp_path / "out", OPTIONS, dev=dev, resume=True)
    assert all((whole[name] == resumed[name]).all() for name in whole)


def test_zeros_that_a_checkpoint_has_by_chance_are_not_kept(tiny_encoder: Path) -> None:
    import torch
    from transformers import AutoModel

    from fastserve.tune.zeros import KeepZeros

    model = AutoModel.from_pretrained(tiny_encoder)
    weight = model.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        weight[0, :4] = 0
    keep = KeepZeros(model)
    # The table's row of the padding token is 0 from the start, too.
    assert keep.num_zeros == 4 + model.embeddings.word_embeddings.embedding_dim
    with torch.no_grad():
        weight[0, 4] = 0  # as if a checkpoint had been loaded
        weight += 1
    keep.on_optimizer_step(None, None, None)  # type: ignore[arg-type]
    assert weight[0, :5].tolist() == [0, 0, 0, 0, 1]


def test_an_adapter_cannot_keep_zeros() -> None:
    with pytest.raises(OptionError, match="keep_zeros is not for method='lora'"):
        TuneOptions(keep_zeros=True, method="lora")
