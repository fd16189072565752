"""Tuning a prefix: from rows to a directory whose predictions, evaluated and served, are the trainer's."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fastserve import LLM, pipeline
from fastserve.cli.main import main
from fastserve.config import EngineOptions
from fastserve.engine.load import load_model
from fastserve.errors import OptionError, UnsupportedError
from fastserve.evaluate.prediction import PredictorOptions
from fastserve.evaluate.task_evaluation import evaluate_folder
from fastserve.tune import TuneOptions, tune
from fastserve.types import SamplingParams
from tiny_prefixes import greedy
from tune.conftest import OVERLAP_KEPT, film_rows

WriteRows = Callable[[str, list[dict[str, Any]]], Path]
QUICK = TuneOptions(
    method="prefix", prefix_tokens=5, epochs=6, batch_size=8, learning_rate=3e-2, device="cpu", max_length=64
)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory, word_tokenizer: Any) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(word_tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["tiny_decoder", "tiny_gpt2"])
def decoder(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


def dialogue_rows() -> list[dict[str, Any]]:
    words = ("Paris", "Rome", "Bonn", "Ann", "Bob")
    return [
        {
            "messages": [
                {"role": "user", "content": f"{word} is good ."},
                {"role": "assistant", "content": f"{word} {word}"},
            ]
        }
        for word in words
    ]


def open_with_peft(folder: Path, kind: str = "AutoModelForCausalLM") -> Any:
    """The model of a directory with its adapter, as people open it without us."""
    import peft
    import transformers

    transformers.utils.logging.set_verbosity_error()
    plain = getattr(transformers, kind).from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft's about transformers
        return peft.PeftModel.from_pretrained(plain, folder / "adapter").eval()


@pytest.mark.parametrize("projects", [False, True])
def test_a_tuned_prefix_is_evaluated_and_served_as_the_trainer_has_it(
    decoder: Path, projects: bool, write_rows: WriteRows, tmp_path: Path
) -> None:
    path = write_rows("rows", dialogue_rows())
    result = tune(
        "dialogue",
        model=str(decoder),
        train=path,
        dev=path,
        on_problem=OVERLAP_KEPT,
        output=tmp_path / "out",
        options=replace(QUICK, prefix_projection=projects, learning_rate=1e-2),
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (decoder, result.path))
    added = after.keys() - before.keys()
    assert added == {f"prefix.layers.{i}.{part}" for i in (0, 1) for part in ("keys", "values")}
    assert all(after[name].shape == (5, 32) for name in added)
    assert all((before[name] == after[name]).all() for name in before)  # nothing else has learned
    for backend in ("native", "torch"):
        given = PredictorOptions(backend=backend, weights="f32", max_tokens=8)
        evaluation = evaluate_folder(result.path, dialogue_rows(), given)
        assert evaluation.backend == backend
        assert evaluation.scores.metrics["loss"] == pytest.approx(result.metrics["loss"], rel=1e-3)
    model, prompt = open_with_peft(result.path), list(range(6, 20))
    for backend in ("native", "torch"):
        with LLM(result.path, backend=backend, weights="f32", kv_dtype="f32") as llm:
            (one,) = llm.generate([prompt], SamplingParams(max_tokens=64, ignore_eos=True))
        assert list(one.checked().token_ids) == greedy(model, prompt, 64)
    with LLM(decoder, weights="f32", kv_dtype="f32") as llm:
        (plain,) = llm.generate([prompt], SamplingParams(max_tokens=64, ignore_eos=True))
    assert plain.checked().token_ids != one.checked().token_ids


def test_a_classifier_learns_behind_a_prefix(decoder: Path, write_rows: WriteRows, tmp_path: Path) -> None:
    rows = film_rows(24)
    path = write_rows("rows", rows)
    result = tune(
        "text-classification",
        model=str(decoder),
        train=path,
        dev=path,
        on_problem=OVERLAP_KEPT,
        output=tmp_path / "out",
        options=replace(QUICK, prefix_tokens=20),
    )
    assert result.metrics["accuracy"] > 0.9
    model = open_with_peft(result.path, "AutoModelForSequenceClassification")
    native, others = (
        evaluate_folder(result.path, rows, PredictorOptions(backend=backend, weights="f32"))
        for backend in ("native", "torch")
    )
    assert native.backend == "native"
    assert native.scores.metrics["accuracy"] == result.metrics["accuracy"]
    with pipeline("text-classification", result.path, weights="f32", kv_dtype="f32") as classify:
        found = classify([row["text"] for row in rows])
    for one, other, answer in zip(native.predictions, others.predictions, found, strict=True):
        assert one["label"] == other["label"] == answer["label"]
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(result.path)
    for row, answer in zip(rows[:6], found[:6], strict=True):
        with torch.inference_mode():
            logits = model(**words(row["text"], return_tensors="pt", return_token_type_ids=False)).logits[0]
        assert answer["label"] == model.config.id2label[int(logits.argmax())]
        assert answer["score"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-3)


def test_a_run_that_goes_on_ends_in_the_same_prefix(
    tiny_decoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    path = write_rows("rows", dialogue_rows())
    options = replace(QUICK, epochs=4, save_steps=1, batch_size=2)

    def run(name: str, *, resume: bool = False, **arguments: Any) -> Path:
        made = tune(
            "dialogue",
            model=str(tiny_decoder),
            train=path,
            output=tmp_path / name,
            options=options,
            resume=resume,
            **arguments,
        )
        return made.path

    whole = load_file(run("whole") / "model.safetensors")

    def stop(progress: Any) -> None:
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("cut", report=stop)
    resumed = load_file(run("cut", resume=True) / "model.safetensors")
    assert resumed.keys() == whole.keys()
    assert all(np.array_equal(resumed[name], whole[name]) for name in whole)


def test_the_commands_tune_evaluate_and_generate(
    tiny_gpt2: Path, write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = str(write_rows("rows", [{"text": "Ann met Bob in Paris ."}] * 4)), str(tmp_path / "out")
    command = ["tune", "causal-lm", "--model", str(tiny_gpt2), "--train", path, "--output", output]
    assert main([*command, "--method", "prefix", "--prefix-tokens", "3", "--epochs", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == output
    assert main(["evaluate", output, "--data", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["perplexity"] > 1
    assert main(["generate", output, "Ann met", "--max-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def refused(model: Path, task: str, path: Path, output: Path, **changes: Any) -> None:
    tune(task, model=str(model), train=path, output=output, options=replace(QUICK, **changes))


def test_what_has_no_prefix_is_refused_before_anything_is_trained(
    tiny_encoder: Path, tiny_decoder: Path, tiny_gpt2: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    texts, tagged = write_rows("texts", film_rows(8)), tmp_path / "tags.jsonl"
    tagged.write_text(json.dumps({"tokens": ["Ann", "met"], "tags": ["B-PER", "O"]}) + "\n", "utf-8")
    out = tmp_path / "out"
    with pytest.raises(UnsupportedError, match=r"is for decoders, and .* \(bert\) is an encoder"):
        refused(tiny_encoder, "text-classification", texts, out)
    with pytest.raises(UnsupportedError, match="method='prefix' is not for token-classification"):
        refused(tiny_decoder, "token-classification", tagged, out)
    with pytest.raises(OptionError, match="prefix_tokens=125 leaves texts 3 of the model's 128 positions"):
        refused(tiny_gpt2, "text-classification", texts, out, prefix_tokens=125, max_length=None)
    with pytest.raises(OptionError, match="128 positions, of which its prefix has 100"):
        refused(tiny_gpt2, "text-classification", texts, out, prefix_tokens=100, max_length=29)
    assert not out.exists()
    with pytest.raises(OptionError, match="gradient_checkpointing is not for method='prefix'"):
        replace(QUICK, gradient_checkpointing=True)
    with pytest.raises(OptionError, match="keep_zeros is not for method='prefix': no matrix learns"):
        replace(QUICK, keep_zeros=True)
    with pytest.raises(OptionError, match="shard cannot be had with method='prefix'"):
        replace(QUICK, shard=True, processes=2)


def test_what_knows_nothing_of_prefixes_refuses_a_model_with_one(
    tiny_decoder: Path, write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write_rows("rows", [{"text": "Ann met Bob ."}] * 4), tmp_path / "out"
    tune("causal-lm", model=str(tiny_decoder), train=path, output=out, options=replace(QUICK, epochs=1))
    load_model(out, EngineOptions())
    with pytest.raises(UnsupportedError, match="has a tuned prefix, which is not tuned on"):
        refused(out, "causal-lm", path, tmp_path / "again")
    for command in (
        ["convert", str(out), "--to", "gguf", "--output", str(tmp_path / "gguf")],
        ["convert", str(out), "--to", "safetensors", "--weights", "f16", "--output", str(tmp_path / "st")],
        ["compress", str(out), "--recipe", "int8", "--output", str(tmp_path / "small")],
    ):
        assert main(command) != 0
        assert "has a tuned prefix" in capsys.readouterr().err, command
