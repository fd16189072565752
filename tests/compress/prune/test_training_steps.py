"""Steps that tune: recovery, gradual pruning and lottery tickets on a tiny encoder and a tiny decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.working_models import all_values, make_context, open_working_model, random_sequences
from fastserve.checkpoint.tensor import TensorFormat
from fastserve.compress.prune.gradual import Gradual, sparsity_at
from fastserve.compress.prune.lottery import Lottery, rewind
from fastserve.compress.prune.magnitude import Magnitude
from fastserve.compress.prune.recover import Recover
from fastserve.compress.prune.structure import find_structure
from fastserve.compress.prune.structured import Structured
from fastserve.compress.prune.taylor import score_by_taylor
from fastserve.compress.prune.training import read_tuning, tune_model, write_trainable
from fastserve.compress.step import Context, Targets, WorkingModel
from fastserve.errors import DataError, OptionError
from stored_tensors import random_grouped
from tune.conftest import film_rows, tiny_decoder, tiny_encoder, word_tokenizer, write_rows

__all__ = ["tiny_decoder", "tiny_encoder", "word_tokenizer", "write_rows"]

WriteRows = Callable[[str, list[dict[str, Any]]], Path]
TUNE = {"epochs": 2, "batch_size": 8, "learning_rate": 5e-3, "device": "cpu", "max_length": 32}
TRAIN = film_rows(32)


@pytest.fixture
def context(write_rows: WriteRows, tmp_path: Path) -> Context:
    return make_context(
        tmp_path,
        task="text-classification",
        train=write_rows("train", TRAIN),
        dev=write_rows("dev", [row for row in film_rows(60)[32:] if row not in TRAIN]),
        calibration=random_sequences(25, 4, 12),
    )


def zeros_of(model: WorkingModel) -> dict[str, np.ndarray]:
    return {
        name: values == 0
        for name, values in all_values(model).items()
        if "layer." in name and values.ndim == 2
    }


def test_recovery_tunes_what_is_left_and_keeps_what_was_pruned(tiny_encoder: Path, context: Context) -> None:
    pruned = Magnitude(sparsity=0.5).run(open_working_model(tiny_encoder), context)
    recovered = Recover(tune=TUNE).run(pruned, context)
    before, after = zeros_of(pruned), zeros_of(recovered)
    assert len(before) == 12
    assert all((after[f"bert.{name}"] == zeros).all() for name, zeros in before.items())
    assert "classifier.weight" in recovered.tensors
    assert recovered.config["id2label"] == {"0": "n", "1": "y"}
    assert context.notes[-1].startswith("recover: accuracy ")


def test_a_recovery_that_has_ended_is_read_and_not_run_again(tiny_encoder: Path, context: Context) -> None:
    model = open_working_model(tiny_encoder)
    first = Recover(tune=TUNE).run(model, context)
    done: list[str] = []
    context.progress = lambda what, done_, total: done.append(what)
    second = Recover(tune=TUNE).run(model, context)
    assert not done
    assert all((v == all_values(second)[name]).all() for name, v in all_values(first).items())
    Recover(tune={**TUNE, "epochs": 1}).run(model, context)
    assert done


def test_an_encoder_without_some_heads_recovers_and_keeps_its_smaller_shape(
    tiny_encoder: Path, context: Context
) -> None:
    model = Recover(tune=TUNE).run(open_working_model(tiny_encoder), context)
    small = Structured(heads=0.5, neurons=0.5, multiple=1).run(model, context)
    recovered = Recover(tune=TUNE).run(small, context)
    assert recovered.config["num_attention_heads"] == 1
    assert recovered.config["head_dim"] == 8
    shapes = {name: tensor.shape for name, tensor in small.tensors.items()}
    assert {name: tensor.shape for name, tensor in recovered.tensors.items()} == shapes
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert shapes[name] == (8, 16)
    assert (all_values(recovered)[name] != all_values(small)[name]).mean() > 0.9


def test_a_decoder_recovers_on_text(tiny_decoder: Path, write_rows: WriteRows, tmp_path: Path) -> None:
    texts = [{"text": row["text"]} for row in film_rows(24)]
    context = make_context(tmp_path, train=write_rows("train", texts))
    pruned = Magnitude(pattern="2:4").run(open_working_model(tiny_decoder), context)
    recovered = Recover(tune=TUNE).run(pruned, context)
    name = "model.layers.1.mlp.down_proj.weight"
    before, after = all_values(pruned)[name], all_values(recovered)[name]
    assert ((after == 0) == (before == 0)).all()
    assert (after != before).any()


def test_the_schedule_is_cubic_and_ends_where_it_should() -> None:
    shares = [sparsity_at(step, 4, first=0.1, last=0.9) for step in range(5)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[-1] == 0.9
    assert shares[2] == pytest.approx(0.9 - 0.8 / 8)
    assert np.all(np.diff(np.diff(shares)) < 0)


@pytest.mark.slow
def test_gradual_pruning_comes_to_its_sparsity_by_steps_that_keep_what_went_before(
    tiny_encoder: Path, context: Context
) -> None:
    model = open_working_model(tiny_encoder)
    last = Gradual(sparsity=0.75, steps=2, tune=TUNE).run(model, context)
    once = Magnitude(sparsity=sparsity_at(1, 2, first=0, last=0.75)).run(model, context)
    first, final = zeros_of(once), zeros_of(last)
    for name, zeros in first.items():
        assert zeros.mean() == pytest.approx(0.65625, abs=0.01)
        assert final[f"bert.{name}"].mean() == pytest.approx(0.75, abs=0.01)
        assert final[f"bert.{name}"][zeros].all()


@pytest.mark.slow
def test_a_ticket_has_early_weights_where_the_trained_ones_are_large(
    tiny_encoder: Path, context: Context
) -> None:
    tuning = read_tuning(TUNE)
    early = tune_model(open_working_model(tiny_encoder), context, tuning, step="lottery")
    trained = tune_model(early, context, tuning, step="lottery")
    ticket = rewind(early, Magnitude(sparsity=0.5, scope="global").run(trained, context), Targets())
    name = "bert.encoder.layer.0.output.dense.weight"
    kept = all_values(ticket)[name] != 0
    assert (all_values(ticket)[name][kept] == all_values(early)[name][kept]).all()
    magnitudes = np.abs(all_values(trained)[name])
    assert magnitudes[kept].min() >= magnitudes[~kept].max()


@pytest.mark.slow
def test_a_lottery_ends_in_a_tuned_ticket_of_the_sparsity_that_was_asked_for(
    tiny_encoder: Path, context: Context
) -> None:
    model = Lottery(sparsity=0.75, rounds=2, rewind_steps=2, tune={**TUNE, "epochs": 1}).run(
        open_working_model(tiny_encoder), context
    )
    zeros = np.concatenate([values.ravel() for values in zeros_of(model).values()])
    assert zeros.mean() == pytest.approx(0.75, abs=0.002)


def test_taylor_scores_are_what_the_loss_changes_by_to_first_order(
    tiny_encoder: Path, context: Context
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = Recover(tune=TUNE).run(open_working_model(tiny_encoder), context)
    parts = find_structure(model).feed_forwards
    scores = score_by_taylor(model, context, parts)
    folder = context.scratch / "reference"
    write_trainable(model, folder)
    network = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = network.bert.encoder.layer[0].output.dense
    unit, rows, expected = 3, film_rows(32), 0.0
    for begin in range(0, 32, 8):
        chosen = rows[begin : begin + 8]
        batch = tokenizer([row["text"] for row in chosen], return_tensors="pt", padding=True)
        labels = torch.tensor(["ny".index(row["label"]) for row in chosen])
        losses = []
        for gate in (0.999, 1.001):
            factor = torch.ones(dense.in_features)
            factor[unit] = gate
            hook = dense.register_forward_pre_hook(lambda _, args, factor=factor: (args[0] * factor,))
            with torch.no_grad():
                losses.append(float(network(**batch, labels=labels).loss.double()))
            hook.remove()
        expected += abs(losses[1] - losses[0]) / 0.002
    assert scores[parts[0].name].shape == (32,)
    assert scores[parts[0].name][unit] == pytest.approx(expected, rel=0.05, abs=1e-4)
    small = Structured(neurons=0.5, heads=0.5, multiple=1, score="taylor").run(model, context)
    assert small.config["intermediate_size"] == 16


def test_what_cannot_be_tuned_is_refused(tiny_encoder: Path, context: Context, tmp_path: Path) -> None:
    model = open_working_model(tiny_encoder)
    with pytest.raises(DataError, match="recover needs rows to tune on"):
        Recover().run(model, make_context(tmp_path))
    context.task = None
    with pytest.raises(OptionError, match="is an encoder of no task"):
        Recover().run(model, context)
    with pytest.raises(OptionError, match="tune: 'keep_zeros' is no option"):
        Recover(tune={"keep_zeros": False})
    with pytest.raises(OptionError, match="epochs=0"):
        Recover(tune={"epochs": 0})
    with pytest.raises(OptionError, match="no steps on the way to pattern='2:4'"):
        Gradual(pattern="2:4")
    name = "encoder.layer.0.output.dense.weight"
    grouped = random_grouped(TensorFormat.BF16, (16, 32), bits=8, group_size=32, name=name)
    with pytest.raises(OptionError, match="recover comes before quantization"):
        Recover().run(model.with_tensors({name: grouped}), context)
