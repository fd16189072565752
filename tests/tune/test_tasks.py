"""Every task learns rows that a tiny model can learn, and its folder opens in `transformers` again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastserve.errors import OptionError
from fastserve.tune import TuneOptions, tune
from tune.conftest import OVERLAP_KEPT, WORDS, film_rows

WriteRows = Callable[[str, list[dict[str, Any]]], Path]
QUICK = TuneOptions(epochs=12, batch_size=8, learning_rate=5e-3, device="cpu", max_length=32, stride=8)


def pair_rows(count: int) -> list[dict[str, Any]]:
    words = ("good", "bad")
    return [
        {
            "text": f"film {words[i % 2]}",
            "text_pair": f"a film is {words[i // 2 % 2]}",
            "label": int(i % 2 == i // 2 % 2 == 0),
        }
        for i in range(count)
    ]


def several_label_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "text": f"{'good' if i % 2 else 'bad'} film {'in Paris' if i // 2 % 2 else '.'}",
            "labels": ["praise"] * (i % 2) + ["place"] * (i // 2 % 2),
        }
        for i in range(count)
    ]


def number_rows(count: int) -> list[dict[str, Any]]:
    return [{"text": f"film {'good ' * (i % 3)}", "label": i % 3 / 2} for i in range(count)]


def relation_rows(count: int) -> list[dict[str, Any]]:
    """Who met whom: the direction is told by the markers alone."""
    rows = []
    for i in range(count):
        spans = ({"start": 0, "end": 3}, {"start": 8, "end": 11})
        head, tail = spans if i % 2 else spans[::-1]
        rows.append(
            {"text": "Ann met Bob .", "head": head, "tail": tail, "label": "met" if i % 2 else "met-by"}
        )
    return rows


def question_rows(count: int) -> list[dict[str, Any]]:
    """Where somebody is; a third of the contexts does not say. Long enough for several windows."""
    rows = []
    for i in range(count):
        city = ("Paris", "Rome", "Bonn")[i % 3]
        before = "the film was good , " * (i % 2 * 3)
        context = f"{before}Ann was in {city} ." if i % 4 else f"{before}the film was bad ."
        answers: dict[str, Any] = {"text": [city], "answer_start": [context.index(city)]} if i % 4 else {}
        rows.append(
            {
                "id": str(i),
                "question": "where is Ann ?",
                "context": context,
                "answers": answers or {"text": [], "answer_start": []},
            }
        )
    return rows


def choice_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "question": "where ?",
            "choices": ["in Rome", "good"] if i % 2 else ["bad", "in Paris"],
            "label": int(not i % 2),
        }
        for i in range(count)
    ]


def near_rows(count: int) -> list[dict[str, Any]]:
    words = ("good", "bad", "Paris", "Rome", "Bonn", "Ann", "Bob", "likes")
    return [{"text": f"a {words[i % 8]}", "text_pair": f"the {words[i % 8]} film"} for i in range(count)]


@pytest.fixture(scope="session")
def lively_encoder(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny encoder with weights ten times as large, which at this width tell its words apart from the
    start: else [CLS] says one thing of a text alone, whoever trains it, and several labels need two."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder") / "lively"
    shutil.copytree(tiny_encoder, folder)
    torch.manual_seed(0)
    BertModel(BertConfig.from_pretrained(folder, initializer_range=0.2)).save_pretrained(folder)
    return folder


CASES = {
    "pair-classification": (pair_rows, "accuracy", 0.95),
    "multi-label": (several_label_rows, "f1_micro", 0.95),
    "regression": (number_rows, "spearman", 0.95),
    "relation-extraction": (relation_rows, "f1", 0.95),
    "question-answering": (question_rows, "f1", 0.9),
    "multiple-choice": (choice_rows, "accuracy", 0.95),
    "embedding": (near_rows, "recall@1", 0.9),
}
_TASK = {"multi-label": "text-classification", "regression": "text-classification"}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_tiny_model_learns_what_can_be_learned(
    case: str, tiny_encoder: Path, lively_encoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    make, metric, least = CASES[case]
    train, dev = write_rows("train", make(64)), write_rows("dev", make(8))
    result = tune(
        _TASK.get(case, case),
        model=str(lively_encoder if case == "multi-label" else tiny_encoder),
        train=train,
        dev=dev,
        on_problem=OVERLAP_KEPT,
        output=tmp_path / "out",
        options=replace(QUICK, metric=metric),
    )
    assert result.metrics[metric] >= least


@pytest.mark.parametrize("method", ["head", "last-layers", "lora", "dora", "ia3"])
def test_methods_change_what_they_say_and_end_in_plain_weights(
    method: Any, tiny_encoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file
    from transformers import AutoModelForSequenceClassification

    rows = write_rows("rows", film_rows(16))
    result = tune(
        "text-classification",
        model=str(tiny_encoder),
        train=rows,
        dev=rows,
        on_problem=OVERLAP_KEPT,
        output=tmp_path / "out",
        options=replace(QUICK, epochs=2, method=method, last_layers=1),
    )
    before = load_file(tiny_encoder / "model.safetensors")
    after = load_file(result.path / "model.safetensors")
    query = "encoder.layer.{}.attention.self.query.weight"
    changed = [bool((before[query.format(i)] != after[f"bert.{query.format(i)}"]).any()) for i in (0, 1)]
    expected = {"head": [False, False], "last-layers": [False, True]}
    assert changed == expected.get(method, [True, True])
    assert (result.path / "adapter").is_dir() == (method in ("lora", "dora", "ia3"))
    AutoModelForSequenceClassification.from_pretrained(result.path)


@pytest.mark.parametrize("method", ["last-layers", "lora"])
def test_methods_change_an_embedding_model_too(
    method: Any, tiny_encoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    pairs = [{"text": f"the {word} is good", "text_pair": f"a good {word}"} for word in WORDS[:8]]
    result = tune(
        "embedding",
        model=str(tiny_encoder),
        train=write_rows("rows", pairs),
        output=tmp_path / "out",
        options=replace(QUICK, epochs=2, method=method, last_layers=1),
    )
    before = load_file(tiny_encoder / "model.safetensors")
    after = load_file(result.path / "model.safetensors")
    assert before.keys() == after.keys()
    query = "encoder.layer.{}.attention.self.query.weight"
    changed = [bool((before[query.format(i)] != after[query.format(i)]).any()) for i in (0, 1)]
    assert changed == [method == "lora", True]


def test_an_embedding_model_has_no_head_to_learn_alone(
    tiny_encoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = write_rows("rows", [{"text": f"the {word}", "text_pair": f"a {word}"} for word in WORDS[:2]])
    with pytest.raises(OptionError, match="no head of its own for embedding"):
        tune(
            "embedding",
            model=str(tiny_encoder),
            train=rows,
            output=tmp_path / "out",
            options=replace(QUICK, method="head"),
        )
