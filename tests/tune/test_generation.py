"""Tuning what writes texts: decoders, one in GGUF, with and without adapters, and an encoder-decoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastserve.data import load_data
from fastserve.errors import UnsupportedError
from fastserve.evaluate.prediction import PredictorOptions
from fastserve.evaluate.task.generation import Generation, render
from fastserve.evaluate.task.task import IGNORED
from fastserve.evaluate.task_evaluation import evaluate_folder
from fastserve.tune import TuneOptions, tune
from tune.conftest import OVERLAP_KEPT, WORDS

WriteRows = Callable[[str, list[dict[str, Any]]], Path]
QUICK = TuneOptions(epochs=30, batch_size=8, learning_rate=5e-3, device="cpu", max_length=64)


def copy_rows(count: int) -> list[dict[str, Any]]:
    """The target is the source's first word, twice."""
    words = ("Paris", "Rome", "Bonn", "Ann", "Bob")
    return [
        {"source": f"{words[i % 5]} is good .", "target": f"{words[i % 5]} {words[i % 5]}"}
        for i in range(count)
    ]


def test_only_what_the_assistant_says_is_learned(word_tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "who is Ann"},
        {"role": "user", "content": "is Ann good ?"},
        {"role": "assistant", "content": "yes ."},
        {"role": "user", "content": "and Bob"},
        {"role": "assistant", "content": "no"},
    ]
    task = Generation(name="dialogue", max_length=64)
    examples = task.encode([{"messages": messages}], word_tokenizer, with_labels=True)
    labels = [label for label in examples.features[0]["labels"] if label != IGNORED]
    assert word_tokenizer.convert_ids_to_tokens(labels) == ["yes", ".", "</s>", "no", "</s>"]
    text, answers = render(messages, word_tokenizer, "row 1")
    assert [text[start:end] for start, end in answers] == ["yes .</s>", "no</s>"]


def test_a_long_text_is_learned_in_pieces_none_of_it_lost(word_tokenizer: Any) -> None:
    task = Generation(name="causal-lm", max_length=8)
    text = " ".join(WORDS)
    examples = task.encode([{"text": text}], word_tokenizer, with_labels=True)
    assert [token for features in examples.features for token in features["input_ids"]] == [
        *word_tokenizer(text)["input_ids"],
        word_tokenizer.eos_token_id,
    ]


def test_a_decoder_learns_to_write_targets_and_the_native_runtime_writes_them(
    tiny_decoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    train, dev = write_rows("train", copy_rows(40)), write_rows("dev", copy_rows(5))
    result = tune(
        "summarization",
        model=str(tiny_decoder),
        train=train,
        dev=dev,
        on_problem=OVERLAP_KEPT,
        output=tmp_path / "out",
        options=replace(QUICK, learning_rate=1e-2),
    )
    assert result.metrics["perplexity"] < 1.3
    rows = load_data(dev, "summarization")
    evaluation = evaluate_folder(result.path, rows, PredictorOptions(weights="f32", max_tokens=8))
    assert evaluation.backend == "native"
    assert evaluation.scores.metrics["exact_match"] == 1.0
    assert evaluation.scores.metrics["rougeL"] == 1.0


def test_an_adapter_is_merged_so_that_the_native_runtime_writes_what_torch_writes(
    tiny_decoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": row["source"]},
                {"role": "assistant", "content": row["target"]},
            ]
        }
        for row in copy_rows(10)
    ]
    path = write_rows("rows", rows)
    result = tune(
        "dialogue",
        model=str(tiny_decoder),
        train=path,
        output=tmp_path / "out",
        options=replace(QUICK, epochs=4, method="lora", rank=16, alpha=64.0, learning_rate=1e-2),
    )
    native, torch = (
        evaluate_folder(
            result.path, rows, PredictorOptions(backend=backend, weights="f32", max_tokens=8)
        ).predictions
        for backend in ("native", "torch")
    )
    assert [one["text"] for one in native] == [one["text"] for one in torch]
    assert [one["num_tokens"] for one in native] == [one["num_tokens"] for one in torch]
    losses = [one["loss_sum"] for one in torch]
    assert [one["loss_sum"] for one in native] == pytest.approx(losses, abs=1e-2)
    assert (result.path / "adapter" / "adapter_config.json").is_file()


@pytest.fixture
def tiny_t5(word_tokenizer: Any, tmp_path: Path) -> Path:
    """An encoder-decoder of two layers each, 32 wide."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(word_tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    word_tokenizer.save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


def test_an_encoder_decoder_reads_the_source_and_writes_the_target(word_tokenizer: Any) -> None:
    task = Generation(name="translation", max_length=16, is_encoder_decoder=True, decoder_start=2)
    told = replace(task, instruction="who is", decoder_start=None)
    row = {"source": "Ann met Bob", "target": "Bob ."}
    for one, source, start in ((task, "Ann met Bob", "<unk>"), (told, "who is Ann met Bob", "<pad>")):
        features = one.encode([row], word_tokenizer, with_labels=True).features[0]
        named = {
            name: word_tokenizer.convert_ids_to_tokens(features[name])
            for name in ("input_ids", "decoder_input_ids", "labels")
        }
        assert named["input_ids"] == source.split()
        assert named["decoder_input_ids"] == [start, "Bob", "."]
        assert named["labels"] == ["Bob", ".", "</s>"]


def test_the_loss_of_an_encoder_decoder_is_that_of_transformers(
    tiny_t5: Path, word_tokenizer: Any, write_rows: WriteRows, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForSeq2SeqLM

    dev_rows = [{"source": "Ann met Bob in Paris", "target": "Bob"}, {"source": "who", "target": "Ann is ."}]
    result = tune(
        "translation",
        model=str(tiny_t5),
        train=write_rows("train", copy_rows(5)),
        dev=write_rows("dev", dev_rows),
        output=tmp_path / "out",
        options=replace(QUICK, epochs=1, learning_rate=1e-3),
    )
    model = AutoModelForSeq2SeqLM.from_pretrained(result.path).eval()
    total, num_tokens = 0.0, 0
    for row in dev_rows:
        labels = word_tokenizer(f"{row['target']} </s>", return_tensors="pt")["input_ids"]
        source = word_tokenizer(row["source"], return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            total += float(model(input_ids=source, labels=labels).loss) * labels.numel()
        num_tokens += labels.numel()
    assert result.metrics["loss"] == pytest.approx(total / num_tokens, rel=1e-5)


@pytest.mark.parametrize("method", ["last-layers", "lora", "ia3"])
def test_methods_change_what_they_say_of_an_encoder_decoder(
    method: Any, tiny_t5: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    options = replace(QUICK, epochs=3, method=method, last_layers=1)
    result = tune(
        "translation",
        model=str(tiny_t5),
        train=write_rows("rows", copy_rows(8)),
        output=tmp_path / "out",
        options=options,
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_t5, result.path))
    assert before.keys() == after.keys()
    changed = {name for name in before if (before[name] != after[name]).any()}
    if method == "last-layers":
        assert changed
        assert all(name.startswith("decoder.block.1.") for name in changed)
    elif method == "lora":
        matrices = {name for name in before if ".block." in name and before[name].ndim == 2}
        assert changed == {name for name in matrices if "relative_attention_bias" not in name}
    else:  # keys, values and what goes into the feed-forward's last matrix, of both parts
        assert {name.rsplit(".", 2)[1] for name in changed} >= {"k", "v", "wo"}
        assert {name.split(".")[0] for name in changed} == {"encoder", "decoder"}


def test_an_encoder_decoder_learns_from_a_teacher_whose_logits_are_of_targets(
    tiny_t5: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    options = replace(QUICK, epochs=1, batch_size=1, teacher=str(tiny_t5), soft_weight=1.0, dropout=0.0)
    rows = [{"source": "Ann met Bob in Paris", "target": "Bob"}, {"source": "who", "target": "Ann is ."}]
    losses: list[float] = []
    tune(
        "translation",
        model=str(tiny_t5),
        train=write_rows("train", rows),
        output=tmp_path / "out",
        options=options,
        report=lambda progress: losses.append(progress.figures.get("loss", 0.0)),
    )
    assert losses
    assert max(losses) == pytest.approx(0, abs=1e-5)  # of a model that learns from itself
    with pytest.raises(UnsupportedError, match="hidden_weight and attention_weight are not for encoder-dec"):
        tune(
            "translation",
            model=str(tiny_t5),
            train=write_rows("train", rows),
            output=tmp_path / "other",
            options=replace(options, hidden_weight=1.0),
        )


@pytest.mark.slow
def test_an_encoder_decoder_learns_to_write_targets(
    tiny_t5: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    train, dev = write_rows("train", copy_rows(40)), write_rows("dev", copy_rows(5))
    result = tune(
        "translation",
        model=str(tiny_t5),
        train=train,
        dev=dev,
        on_problem=OVERLAP_KEPT,
        output=tmp_path / "out",
        options=replace(QUICK, learning_rate=1e-2),
    )
    assert result.metrics["perplexity"] < 1.5
    rows = load_data(dev, "translation")
    evaluation = evaluate_folder(result.path, rows, PredictorOptions(weights="f32", max_tokens=8))
    assert evaluation.backend == "native"
    assert evaluation.scores.metrics["exact_match"] == 1.0


def test_the_native_runtime_writes_what_torch_writes_of_an_encoder_decoder(
    tiny_t5: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    result = tune(
        "summarization",
        model=str(tiny_t5),
        train=write_rows("train", copy_rows(5)),
        output=tmp_path / "out",
        options=replace(QUICK, epochs=6, learning_rate=1e-2, instruction="who is"),
    )
    rows = [{"source": source, "target": "Bob"} for source in ("Ann met Bob", "where is Rome ?", "good film")]
    native, torch = (
        evaluate_folder(result.path, rows, PredictorOptions(backend=backend, weights="f32", max_tokens=8))
        for backend in ("native", "torch")
    )
    assert [one["text"] for one in native.predictions] == [one["text"] for one in torch.predictions]
    assert any(one["text"] for one in native.predictions)
    assert "perplexity" in torch.scores.metrics
    assert "perplexity" not in native.scores.metrics


def test_a_gguf_file_is_tuned_by_its_dequantized_weights_which_the_lineage_says(
    shared_data: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = write_rows("rows", [{"text": f"Once upon a time there was a {word}."} for word in ("cat", "dog")])
    model = shared_data / "model_stories260K" / "stories260K.gguf"
    options = replace(QUICK, epochs=4, batch_size=2, learning_rate=1e-3, method="lora")
    result = tune(
        "causal-lm",
        model=str(model),
        train=rows,
        dev=rows,
        on_problem=OVERLAP_KEPT,
        output=tmp_path / "out",
        options=options,
    )
    lineage = json.loads((result.path / "fastserve.json").read_text("utf-8"))["lineage"]
    assert lineage["parent"]["format"] == "gguf"
    assert (result.path / "adapter" / "adapter_config.json").is_file()
    log = [
        json.loads(line) for line in (result.path / "training" / "log.jsonl").read_text("utf-8").splitlines()
    ]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert losses[-1] < losses[0] < 4.0  # a random model has ln 512 = 6.2
    for backend in ("torch", "native"):
        given = PredictorOptions(backend=backend, weights="f32")
        evaluation = evaluate_folder(result.path, load_data(rows, "causal-lm"), given)
        assert evaluation.backend == backend
        assert evaluation.scores.metrics["loss"] == pytest.approx(min(losses), rel=1e-3)
