"""Quantization-aware tuning: what is stored is what was computed with, zeros stay, and less is lost than by
rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("fastserve._native")

from compress.working_models import all_values, make_context, open_working_model
from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.compress.artifact import write_artifact
from fastserve.compress.prune.magnitude import Magnitude
from fastserve.compress.prune.structured import Structured
from fastserve.compress.quantize.qat import Qat
from fastserve.compress.quantize.step import Rtn
from fastserve.compress.recipe import parse_recipe
from fastserve.compress.step import Context, Targets, WorkingModel
from fastserve.errors import DataError, OptionError
from fastserve.evaluate.language_model import LanguageModel, perplexity
from fastserve.evaluate.torch_model import run_examples
from fastserve.tune import TuneOptions, tune
from tune.conftest import film_rows, tiny_decoder, tiny_encoder, word_tokenizer, write_rows

__all__ = ["tiny_decoder", "tiny_encoder", "word_tokenizer", "write_rows"]

WriteRows = Callable[[str, list[dict[str, Any]]], Path]
TUNE: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 8,
    "learning_rate": 5e-3,
    "device": "cpu",
    "max_length": 32,
}
KEPT: dict[str, Any] = {"on_problem": {"split-overlap": "keep"}}


@pytest.fixture
def context(write_rows: WriteRows, tmp_path: Path) -> Context:
    return make_context(
        tmp_path,
        task="text-classification",
        train=write_rows("train", film_rows(32)),
        dev=write_rows("dev", film_rows(8)),
    )


def exact_values(tensor: GroupedTensor) -> torch.Tensor:
    """What the native runtime multiplies with: codes times scales, not rounded to the scales' format."""
    codes, zeros, scales = tensor.groups(0, tensor.shape[0])
    of_column = tensor.column_groups()
    less = codes.astype(np.float32) - (0 if zeros is None else zeros.astype(np.float32)[:, of_column])
    return torch.from_numpy(less * scales[:, of_column])


def with_exact_values(network: Any, model: WorkingModel) -> Any:
    weights = {
        name: exact_values(tensor) if isinstance(tensor, GroupedTensor) else torch.from_numpy(values)
        for (name, tensor), values in zip(model.tensors.items(), all_values(model).values(), strict=True)
    }
    network.load_state_dict(weights, strict=False)
    return network.eval()


def listen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The examples of every evaluation of a run, and their logits."""
    heard: list[dict[str, Any]] = []

    def run(network: Any, features: Any, **options: Any) -> Any:
        found = run_examples(network, features, **options)
        heard.append({"features": features, "logits": found[0], "options": options})
        return found

    monkeypatch.setattr("fastserve.tune.trainer.run_examples", run)
    return heard


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 2, "granularity": "channel"},
        {"bits": 3, "granularity": "channel", "scales": "rtn", "targets": Targets(tables=True)},
        {"bits": 4, "granularity": "tensor", "symmetric": False, "scale_format": "f16"},
    ],
    ids=str,
)
def test_the_artifact_has_the_numbers_that_the_last_evaluation_was_computed_with(
    tiny_encoder: Path,
    context: Context,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    from transformers import AutoModelForSequenceClassification

    heard = listen(monkeypatch)
    model = Qat(**options, tune={**TUNE, **KEPT}).run(open_working_model(tiny_encoder), context)
    grouped = {name: t for name, t in model.tensors.items() if isinstance(t, GroupedTensor)}
    assert len(grouped) == 12 + ("targets" in options)
    assert not any("fake_quantization" in name for name in model.tensors)
    output = tmp_path / "out"
    write_artifact(model, output, {"lineage": {}})
    (source,) = context.scratch.glob("qat-*/tuned")
    network = AutoModelForSequenceClassification.from_pretrained(source)
    stored = WorkingModel(checkpoint=open_checkpoint(output))
    assert isinstance(stored.tensors["bert.encoder.layer.0.output.dense.weight"], GroupedTensor)
    logits, _ = run_examples(
        with_exact_values(network, stored), heard[-1]["features"], **heard[-1]["options"]
    )
    np.testing.assert_array_equal(np.stack(logits), np.stack(heard[-1]["logits"]))
    assert context.notes[-1].startswith("qat: accuracy ")
    assert {layer.step for layer in context.layers} == {"qat"}


def test_an_interrupted_run_ends_in_the_same_codes(
    tiny_encoder: Path, context: Context, tmp_path: Path
) -> None:
    step = Qat(bits=3, granularity="channel", tune={**TUNE, **KEPT})
    whole = step.run(open_working_model(tiny_encoder), context)
    again = make_context(tmp_path / "scratch", task=context.task, train=context.train, dev=context.dev)

    def stop(what: str, done: int, total: int) -> None:
        if done == 6:
            raise InterruptedError

    again.progress = stop
    with pytest.raises(InterruptedError):
        step.run(open_working_model(tiny_encoder), again)
    assert list(again.scratch.glob("qat-*/tuned.run/checkpoints/checkpoint-4/trainer_state.json"))
    again.progress = lambda *_: None
    resumed = step.run(open_working_model(tiny_encoder), again)
    for name, values in all_values(whole).items():
        np.testing.assert_array_equal(all_values(resumed)[name], values, err_msg=name)


def test_pruned_weights_stay_zero_in_the_codes(tiny_encoder: Path, context: Context) -> None:
    pruned = Magnitude(sparsity=0.5).run(open_working_model(tiny_encoder), context)
    model = Qat(bits=4, granularity="channel", tune=TUNE | KEPT).run(pruned, context)
    for name, before in all_values(pruned).items():
        if ".layer." in name and before.ndim == 2:
            tensor = model.tensors[f"bert.{name}"]
            assert isinstance(tensor, GroupedTensor)
            assert not tensor.groups(0, len(before)).codes[before == 0].any(), name


def test_an_encoder_without_some_heads_keeps_its_shape_and_its_groups(
    tiny_encoder: Path, context: Context
) -> None:
    context.calibration = [[5, 6, 7, 8]]
    small = Structured(heads=0.5, neurons=0.0, multiple=1).run(open_working_model(tiny_encoder), context)
    model = Qat(bits=4, granularity="channel", tune=TUNE | KEPT).run(small, context)
    name = "encoder.layer.0.attention.output.dense.weight"
    tensor = model.tensors[f"bert.{name}"]
    assert isinstance(tensor, GroupedTensor)
    assert tensor.shape == small.tensors[name].shape == (16, 8)
    assert tensor.group_size == 8


def test_a_decoder_tuned_at_two_bits_loses_less_than_a_rounded_one(
    tiny_decoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    sentences = [
        "Ann met Bob in Paris .",
        "who likes Bob ? Ann .",
        "the film was good , yes !",
        "no , a bad film .",
    ]
    train = write_rows("train", [{"text": text} for text in 12 * sentences])
    source = tune(
        "causal-lm",
        model=str(tiny_decoder),
        train=train,
        output=tmp_path / "source",
        options=TuneOptions(**{**TUNE, "epochs": 25}),
    ).path
    context = make_context(tmp_path, train=train)
    model = open_working_model(source)
    targets = Targets(tables=True)
    rounded = Rtn(bits=2, granularity="channel", targets=targets).run(model, context)
    learned = Qat(
        bits=2,
        granularity="channel",
        activations="int8",
        distil=True,
        targets=targets,
        tune=TUNE | {"epochs": 8},
    ).run(model, context)
    windows = [open_words(source, text) for text in sentences]
    before, rtn, qat = (
        perplexity(LanguageModel(each.checkpoint, weights="f32", threads=1), windows).value
        for each in (model, rounded, learned)
    )
    assert before < rtn
    assert np.log(qat) < 0.6 * np.log(rtn)


def open_words(folder: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return list(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])


@pytest.mark.slow
def test_rounded_activations_are_those_of_the_native_runtime(
    tiny_decoder: Path, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": row["text"]} for row in film_rows(24)]
    context = make_context(tmp_path, train=write_rows("train", rows), dev=write_rows("dev", rows[:4]))
    heard = listen(monkeypatch)
    step = Qat(bits=4, group_size=32, activations="int8", tune=TUNE | KEPT)
    model = step.run(open_working_model(tiny_decoder), context)
    native = LanguageModel(model.checkpoint, weights="stored", kv_dtype="f32", threads=1)
    for features, (total, _) in zip(heard[-1]["features"], heard[-1]["logits"], strict=True):
        losses = native.losses(features["input_ids"])
        assert float(losses.sum()) == pytest.approx(float(total), rel=1e-5)


def test_embeddings_are_tuned_on_the_grid_too(
    tiny_encoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    pairs = [{"text": f"a film {word}", "text_pair": f"the film {word}"} for word in ("good", "bad") * 8]
    context = make_context(tmp_path, task="embedding", train=write_rows("train", pairs))
    step = parse_recipe({"steps": [{"qat": {"bits": 4, "granularity": "channel", "tune": TUNE}}]}, name="x")
    model = step.steps[0].step.run(open_working_model(tiny_encoder), context)
    name = "encoder.layer.1.output.dense.weight"
    assert isinstance(model.tensors[name], GroupedTensor)
    assert not any("fake_quantization" in name for name in model.tensors)


def test_what_cannot_be_tuned_on_a_grid_is_refused(
    tiny_encoder: Path, context: Context, tmp_path: Path
) -> None:
    model = open_working_model(tiny_encoder)
    with pytest.raises(DataError, match="qat needs rows to tune on"):
        Qat(granularity="channel").run(model, make_context(tmp_path))
    with pytest.raises(OptionError, match="bits='5'"):
        Qat(bits=5)
    with pytest.raises(OptionError, match=r"\[16, 16\] cannot be quantized in groups of 64 columns"):
        Qat().run(model, context)
    with pytest.raises(OptionError, match="scales='free'"):
        Qat(scales="free")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="tune: a teacher is named"):
        Qat(tune={"teacher": "t"})
    with pytest.raises(OptionError, match="soft_weight is for learning from a teacher"):
        Qat(tune={"soft_weight": 0.7})
    with pytest.raises(OptionError, match="not for 8 bits with zero points"):
        Qat(bits=8, symmetric=False, activations="int8")
    rounded = Rtn(granularity="channel").run(model, context)
    with pytest.raises(OptionError, match="qat comes before quantization"):
        Qat(granularity="channel").run(rounded, context)


def test_a_change_of_weights_wants_whole_weights(tiny_encoder: Path, context: Context) -> None:
    from fastserve.compress.quantize.fake_quantization import FakeQuantization
    from fastserve.compress.quantize.grid import Grid

    change = FakeQuantization(names=("encoder.layer.0.output.dense.weight",), grid=Grid())
    assert context.train is not None
    with pytest.raises(OptionError, match="method='lora' does not go with a change of weights"):
        tune(
            "text-classification",
            model=str(tiny_encoder),
            train=context.train,
            output=context.scratch / "out",
            options=TuneOptions(**TUNE, method="lora"),
            change=change,
        )
