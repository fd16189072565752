"""Whole runs of compression from Python: decoders, encoders with a task and without, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastserve._native")
pytest.importorskip("transformers")

import fastserve
from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.safetensors_writer import floats, write_safetensors
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.compress import CompressData, compress
from fastserve.compress import probe as probe_module
from fastserve.errors import CheckpointError, DataError, OptionError, UnsupportedError
from fastserve.evaluate.language_model import log_softmax
from fastserve.types import SamplingParams
from tiny_heads import save_bert_head
from tune.conftest import tiny_encoder as tiny_encoder


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def write_recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_decoder_keeps_its_predictions_at_int8_in_transformers_too(
    stories_folder: Path, story_file: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = digests(stories_folder)
    told: list[str] = []
    result = compress(
        stories_folder,
        recipe="int8",
        output=tmp_path / "out",
        data=CompressData(judged=story_file),
        progress=lambda what, done, total: told.append(what),
    )
    assert digests(stories_folder) == before
    assert result.path == tmp_path / "out"
    assert {"rtn", "writing", "probes", "perplexity", "speed"} <= set(told)
    quality = result.report["quality"]
    assert quality["apart"]["mean_kl"]["value"] < 0.01
    assert abs(quality["change"]) < 0.02
    assert quality["change"] == -quality["metrics"]["perplexity"]["difference"]["value"]

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer(story_file.read_text("utf-8"), return_tensors="pt")["input_ids"][:, :256]
    with torch.no_grad():
        dense, packed = (
            log_softmax(AutoModelForCausalLM.from_pretrained(folder)(ids).logits[0].float().numpy())
            for folder in (stories_folder, tmp_path / "out")
        )
    assert (np.exp(dense) * (dense - packed)).sum(axis=1).mean() < 0.01
    best = np.partition(dense, -2, axis=1)[:, -2:]
    is_clear = best[:, 1] - best[:, 0] > 0.1
    assert (dense.argmax(axis=1) == packed.argmax(axis=1))[is_clear].mean() >= 0.99

    card = json.loads((tmp_path / "out" / "fastserve.json").read_text("utf-8"))
    assert card["lineage"]["parent"]["weights_sha256"] == before["model.safetensors"]
    assert card["lineage"]["data"]["data"]["sha256"] == hashlib.sha256(story_file.read_bytes()).hexdigest()
    with fastserve.LLM(tmp_path / "out") as llm:
        for probe in card["probes"]:
            params = SamplingParams(max_tokens=probe["max_tokens"], ignore_eos=True)
            (completion,) = llm.generate([probe["prompt"]], params)
            assert list(completion.token_ids) == probe["token_ids"]


@pytest.mark.usefixtures("without_speed")
def test_steps_follow_each_other_and_calibrate_on_the_text_that_is_given(
    stories_folder: Path, story_file: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path,
        "calibration: {sequences: 4, length: 64}\n"
        "steps: [{magnitude: {sparsity: 0.5}}, {gptq: {bits: 8, granularity: channel}}]",
    )
    result = compress(
        stories_folder,
        recipe=recipe,
        output=tmp_path / "out",
        data=CompressData(calibration=story_file, judged=story_file),
    )
    layers = {layer["name"]: layer for layer in result.report["layers"]}
    matrix = layers["model.layers.2.mlp.down_proj.weight"]
    assert [error["step"] for error in matrix["errors"]] == ["magnitude", "gptq"]
    assert 0.5 <= matrix["sparsity"] < 0.6
    assert matrix["bits_per_element"] < 6.5
    assert result.report["size"]["form"] == "fastserve"
    assert open_checkpoint(tmp_path / "out").tensors.keys() == open_checkpoint(stories_folder).tensors.keys()


@pytest.mark.usefixtures("without_speed")
def test_a_run_that_was_killed_goes_on_to_the_same_weights(
    stories_folder: Path, story_file: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path,
        "calibration: {sequences: 4, length: 64}\n"
        "steps: [{magnitude: {sparsity: 0.5}}, {gptq: {bits: 4, misfit: channel}}]",
    )
    data = CompressData(calibration=story_file)
    told: list[tuple[str, int]] = []

    def stop(what: str, done: int, total: int) -> None:
        told.append((what, done))
        if what == "writing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(stories_folder, recipe=recipe, output=tmp_path / "out", data=data, progress=stop)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OptionError, match="unfinished run"):
        compress(stories_folder, recipe=recipe, output=tmp_path / "out", data=data)
    with pytest.raises(OptionError, match="seed=1 differs from 0"):
        compress(stories_folder, recipe=recipe, output=tmp_path / "out", data=data, resume=True, seed=1)
    compress(stories_folder, recipe=recipe, output=tmp_path / "out", data=data, resume=True)
    compress(stories_folder, recipe=recipe, output=tmp_path / "whole", data=data)
    one, other = (digests(tmp_path / name) for name in ("out", "whole"))
    assert {name for name in one if name.endswith(".safetensors")} == {
        "fastserve.safetensors",
        "model.safetensors",
    }
    for name in ("fastserve.safetensors", "model.safetensors", "config.json"):
        assert one[name] == other[name]
    assert not (tmp_path / "out.run").exists()


@pytest.mark.usefixtures("without_speed")
def test_what_is_left_in_blocks_of_gguf_is_told(stories_folder: Path, tmp_path: Path) -> None:
    result = compress(stories_folder / "stories260K.gguf", recipe="int8", output=tmp_path / "out")
    formats = {t.format.block_elements for t in open_checkpoint(tmp_path / "out").tensors.values()}
    assert formats == {1}
    source = open_checkpoint(stories_folder / "stories260K.gguf")
    has_blocks = any(
        tensor.format.block_elements > 1 for name, tensor in source.tensors.items() if "embed_tokens" in name
    )
    assert any("became bfloat16" in note for note in result.report["notes"]) == has_blocks


@pytest.mark.usefixtures("without_speed")
def test_an_archive_is_smaller_opens_like_the_artifact_and_keeps_its_report(
    stories_folder: Path, story_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("constriction")
    monkeypatch.setenv("FASTSERVE_HOME", str(tmp_path / "home"))
    recipe = write_recipe(
        tmp_path, "steps: [{magnitude: {sparsity: 0.5}}, {rtn: {bits: 4, misfit: channel}}]"
    )
    plain, archive = (
        compress(stories_folder, recipe=recipe, output=tmp_path / name, archive=name == "archive")
        for name in ("plain", "archive")
    )
    assert plain.path is not None
    assert archive.path is not None
    size = archive.report["archive"]["file_bytes"]
    assert size < plain.report["size"]["after_bytes"]
    assert sum(path.stat().st_size for path in archive.path.glob("*.safetensors")) == size
    tensors = open_checkpoint(archive.path).tensors
    for name, tensor in open_checkpoint(plain.path).tensors.items():
        np.testing.assert_array_equal(to_f32(tensors[name]), to_f32(tensor))
    assert "archive, MB" in (archive.path / "README.md").read_text("utf-8")
    assert (archive.path / "compression" / "report.html").is_file()


def test_a_classifier_is_judged_by_its_task_and_keeps_it(
    tmp_path: Path, write_rows: Callable[[str, Iterable[Mapping[str, Any]]], Path]
) -> None:
    card = {"task": "text-classification", "max_length": 64, "problem": "single-label"}
    source = tmp_path / "source"
    save_bert_head(source, "ForSequenceClassification", labels=("no", "yes"), card=card)
    texts = ["Ada was born in London", "the cat", "good!", "bad was the cat in London", "born ?"] * 4
    rows = write_rows("rows", [{"text": text, "label": "yes"} for text in texts])
    result = compress(
        source, recipe="int8", output=tmp_path / "out", data=CompressData(judged=rows), threads=1
    )
    quality = result.report["quality"]
    assert quality["judged_by"] == "20 rows of text-classification"
    accuracy = quality["metrics"]["accuracy"]
    assert accuracy["after"]["low"] <= accuracy["after"]["value"] <= accuracy["after"]["high"]
    assert quality["apart"]["top1_agreement"]["value"] >= 0.9
    assert 0 <= quality["apart"]["mean_kl"]["value"] < 0.01
    assert result.report["speed"]["after"]["sentence_ms"] > 0
    written = json.loads((tmp_path / "out" / "fastserve.json").read_text("utf-8"))
    assert {key: written[key] for key in card} == card
    assert written["metrics"]["accuracy"] == accuracy["after"]["value"]
    with fastserve.pipeline("text-classification", tmp_path / "out") as classify:
        assert classify("the cat")["label"] in ("no", "yes")


@pytest.mark.usefixtures("without_speed")
def test_a_decoder_that_classifies_is_judged_by_its_task(
    stories_folder: Path, tmp_path: Path, write_rows: Callable[[str, Iterable[Mapping[str, Any]]], Path]
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    source = tmp_path / "source"
    labels = {0: "no", 1: "yes"}
    model = AutoModelForSequenceClassification.from_pretrained(
        stories_folder, num_labels=2, id2label=labels, pad_token_id=0
    )
    model.save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(stories_folder / name, source / name)
    rows = write_rows("rows", [{"text": f"One {word}.", "label": "yes"} for word in ("cat", "dog", "car")])
    result = compress(source, recipe="int8", output=tmp_path / "out", data=CompressData(judged=rows))
    quality = result.report["quality"]
    assert quality["judged_by"] == "3 rows of text-classification"
    assert quality["apart"]["mean_kl"]["value"] < 0.01
    probes = json.loads((tmp_path / "out" / "fastserve.json").read_text("utf-8"))["probes"]
    assert [len(probe["values"]) for probe in probes] == [2, 2, 2]


@pytest.mark.usefixtures("without_speed")
def test_an_encoder_without_a_task_is_judged_by_its_embeddings(tiny_encoder: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("the film was good\nBob met Ann in Rome\nwho likes Paris ?\nyes and no .\n", "utf-8")
    result = compress(tiny_encoder, recipe="int8", output=tmp_path / "out", data=CompressData(judged=texts))
    quality = result.report["quality"]
    assert quality["judged_by"] == "embeddings of 4 texts"
    assert -0.01 < quality["change"] == quality["metrics"]["cosine"]["after"]["value"] - 1 <= 1e-6
    assert quality["apart"]["same_neighbour"]["value"] >= 0.5


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(UnsupportedError, match="is an encoder-decoder"):
        compress(tmp_path / "t5", recipe="int8", output=tmp_path / "out")
    assert not (tmp_path / "out.run").exists()


def with_numbers(source: Path, folder: Path, name: str, value: float) -> Path:
    """A copy of a model in which one number is another."""
    shutil.copytree(source, folder)
    tensors = dict(open_checkpoint(source).tensors)
    values = to_f32(tensors[name]).copy()
    values[1, 2] = value
    data = values.view(np.uint8).reshape(-1)
    tensors[name] = StoredTensor(name, TensorFormat.F32, values.shape, data)
    (folder / "model.safetensors").chmod(0o644)
    write_safetensors(folder / "model.safetensors", [floats(t, t.format) for t in tensors.values()])
    return folder


def test_weights_that_are_not_finite_are_refused_by_name(stories_folder: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    source = with_numbers(stories_folder, tmp_path / "source", name, float("nan"))
    with pytest.raises(CheckpointError, match=rf"{name} \[172, 64\] has 1 numbers in rows 0 to 171"):
        compress(source, recipe="int8", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.run").exists()


def test_answers_that_differ_from_the_model_in_memory_are_refused(
    stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_module, "_complete", lambda folder, prompts, count, threads: [[1] * count] * 3)
    with pytest.raises(CheckpointError, match="does not answer as the model that was written"):
        compress(stories_folder, recipe="int8", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_source_is_no_place_for_the_output_and_too_little_text_is_said(
    stories_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="lies in the source model"):
        compress(stories_folder, recipe="int8", output=stories_folder / "out")
    with pytest.raises(OptionError, match="lies in the source model"):
        compress(stories_folder, recipe="int8", output=stories_folder)
    short = tmp_path / "short.txt"
    short.write_text("One cat.\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"too little text .* 256 are needed"):
        compress(
            stories_folder,
            recipe="int4-gptq",
            output=tmp_path / "out",
            data=CompressData(calibration=short),
        )
    assert not (tmp_path / "out").exists()
