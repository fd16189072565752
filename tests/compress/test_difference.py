"""Where two models differ, against what was changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastserve._native")
pytest.importorskip("transformers")

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.rounding import round_to_groups
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.cli.main import main
from fastserve.compress.artifact import write_artifact
from fastserve.compress.difference import find_differences
from fastserve.compress.step import Targets, WorkingModel
from fastserve.errors import UnsupportedError
from tiny_heads import save_bert_head

CHANGED = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture
def changed_folder(stories_folder: Path, tmp_path: Path) -> Path:
    """The model of stories with one matrix 10 % larger."""
    model = WorkingModel(checkpoint=open_checkpoint(stories_folder))
    values = to_f32(model.tensors[CHANGED]) * np.float32(1.1)
    tensor = StoredTensor(CHANGED, TensorFormat.F32, values.shape, values.view(np.uint8).reshape(-1))
    write_artifact(model.with_tensors({CHANGED: tensor}), tmp_path / "changed", {})
    return tmp_path / "changed"


def test_the_layer_that_was_changed_is_found_and_what_comes_after_it(
    stories_folder: Path, changed_folder: Path, story_file: Path
) -> None:
    found = find_differences(stories_folder, changed_folder, story_file, limit=1)
    layers = {layer.name: layer for layer in found.layers}
    assert layers[CHANGED].weights == pytest.approx(0.01, rel=1e-4)
    assert layers[CHANGED].outputs == pytest.approx(0.01, rel=1e-3)
    order = [layer.name for layer in found.layers]
    assert all(layer.weights == 0.0 for name, layer in layers.items() if name != CHANGED)
    assert layers["model.layers.2.mlp.up_proj.weight"].outputs == 0.0
    assert layers["model.layers.3.mlp.up_proj.weight"].outputs > 0.0
    assert {CHANGED, "model.layers.3.mlp.up_proj.weight"} <= set(order)
    assert found.figures["mean_kl"].value > 0
    kls = [token.kl for token in found.tokens]
    assert kls == sorted(kls, reverse=True)
    assert kls[0] >= found.figures["mean_kl"].value
    json.dumps(found.to_json())


def test_tokens_are_shown_with_the_text_before_them(
    stories_folder: Path, changed_folder: Path, story_file: Path
) -> None:
    text = story_file.read_text("utf-8")
    found = find_differences(stories_folder, changed_folder, story_file, limit=1)
    for token in found.tokens[:5]:
        assert (token.before + token.follows).strip() in text


def test_answers_that_flip_are_named_by_their_rows(
    tmp_path: Path, write_rows: Callable[[str, Iterable[Mapping[str, Any]]], Path]
) -> None:
    card = {"task": "text-classification", "max_length": 64, "problem": "single-label"}
    source = save_bert_head(tmp_path / "one", "ForSequenceClassification", labels=("no", "yes"), card=card)
    model = WorkingModel(checkpoint=open_checkpoint(source))
    head = model.tensors["classifier.weight"]
    values = -to_f32(head)  # every answer the other way, but for the bias
    bias = np.zeros(2, np.float32)
    one = model.with_tensors({"classifier.bias": _floats("classifier.bias", bias)})
    write_artifact(one, tmp_path / "a", {})
    write_artifact(one.with_tensors({"classifier.weight": _floats(head.name, values)}), tmp_path / "b", {})
    rows = write_rows("rows", [{"text": text, "label": "yes"} for text in ("the cat", "London", "good!")])
    found = find_differences(tmp_path / "a", tmp_path / "b", rows)
    assert found.num_flips == 3
    assert [flip.place for flip in found.flips] == [f"{rows}:{line}" for line in (1, 2, 3)]
    assert all({flip.answer, flip.other_answer} == {"no", "yes"} for flip in found.flips)
    assert found.judged_by == "3 rows of text-classification"


def _floats(name: str, values: Any) -> StoredTensor:
    return StoredTensor(name, TensorFormat.F32, values.shape, values.view(np.uint8).reshape(-1))


def test_the_command_shows_what_became_of_each_matrix(
    stories_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = WorkingModel(checkpoint=open_checkpoint(stories_folder))
    names = model.matrices(Targets())
    rounded = {
        name: round_to_groups(model.tensors[name], bits=8, group_size=0, scale_format=TensorFormat.BF16)
        for name in names
    }
    write_artifact(model.with_tensors(rounded), tmp_path / "b", {})
    assert main(["compress", "diff", str(stories_folder), str(tmp_path / "b")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("\t") == ["matrix", "A", "B", "weights", "outputs"]
    row = next(line.split("\t") for line in lines if line.startswith(CHANGED))
    assert row[1:3] == ["f32", "int8 in rows"]
    assert 0 < float(row[3].rstrip("%")) < 0.1
    assert main(["compress", "diff", str(stories_folder), str(tmp_path / "b"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == len(model.tensors) - 11
    assert main(["compress", "diff", str(stories_folder)]) == 2
    assert "B" in capsys.readouterr().err


def cut(folder: Path, output: Path, *, vocab_size: int, context: int) -> Path:
    """The model of stories with its first tokens only, and a shorter context."""
    checkpoint = open_checkpoint(folder)
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        is_table = name in ("model.embed_tokens.weight", "lm_head.weight")
        values = to_f32(tensor)[: vocab_size if is_table else None].copy()
        tensors[name] = StoredTensor(name, TensorFormat.F32, values.shape, values.view(np.uint8).reshape(-1))
    config = {**checkpoint.config, "vocab_size": vocab_size, "max_position_embeddings": context}
    write_artifact(WorkingModel(checkpoint=replace(checkpoint, tensors=tensors, config=config)), output, {})
    return output


def test_models_of_two_vocabularies_differ_in_weights_and_are_not_asked_for_tokens(
    stories_folder: Path, story_file: Path, tmp_path: Path
) -> None:
    fewer = cut(stories_folder, tmp_path / "fewer", vocab_size=300, context=512)
    layers = {layer.name: layer.weights for layer in find_differences(stories_folder, fewer).layers}
    assert layers["model.embed_tokens.weight"] is None
    assert layers[CHANGED] == 0.0
    for pair in ((stories_folder, fewer), (fewer, stories_folder)):
        with pytest.raises(UnsupportedError, match=r"vocabularies of (512 and 300|300 and 512) tokens"):
            find_differences(*pair, story_file)


@pytest.mark.parametrize("is_first", [True, False])
def test_texts_are_as_long_as_the_shorter_context(
    stories_folder: Path, story_file: Path, tmp_path: Path, is_first: bool
) -> None:
    pair = [stories_folder, cut(stories_folder, tmp_path / "short", vocab_size=512, context=48)]
    found = find_differences(*(reversed(pair) if is_first else pair), story_file, limit=1)
    assert found.judged_by == "1 windows of 48 tokens"
    assert {layer.outputs for layer in found.layers if layer.name != "model.embed_tokens.weight"} == {0.0}


def test_models_of_two_kinds_are_not_compared(stories_folder: Path, tmp_path: Path) -> None:
    encoder = save_bert_head(tmp_path / "one", "ForSequenceClassification", labels=("no", "yes"))
    with pytest.raises(UnsupportedError, match="not of one kind"):
        find_differences(stories_folder, encoder)
