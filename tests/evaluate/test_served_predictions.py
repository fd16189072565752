"""What `fastserve.pipeline` predicts natively, against what the trainer's own tasks say of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fastserve
from fastserve.evaluate.task.table import task_of_folder
from tiny_heads import open_with_transformers, save_bert_head, save_roberta_head

pytest.importorskip("fastserve._native")

CLOSE = 1e-3
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
LONG = "Ada Lovelace, was born in London (good)! " * 9
TEXT = "Ada was born in London"
RELATION = {"head": {"start": 16, "end": 22}, "tail": {"start": 0, "end": 3}}
SEQUENCE, TOKENS = "ForSequenceClassification", "ForTokenClassification"

# Of each task: the head, its labels, what fastserve.json and the config say, rows.
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any], dict[str, Any], list[dict[str, Any]]]] = {
    "one label": (
        SEQUENCE,
        ("bad", "good", "so-so"),
        {"task": "text-classification", "max_length": 64, "problem": "single-label"},
        {"problem_type": "single_label_classification"},
        [{"text": text} for text in (TEXT, LONG, "?")],
    ),
    "several labels": (
        SEQUENCE,
        ("a", "b", "c"),
        {"task": "text-classification", "max_length": 64, "problem": "multi-label"},
        {"problem_type": "multi_label_classification"},
        [{"text": text} for text in (TEXT, LONG)],
    ),
    "a number": (
        SEQUENCE,
        ("value",),
        {"task": "text-classification", "max_length": 64, "problem": "regression"},
        {"problem_type": "regression"},
        [{"text": text} for text in (TEXT, LONG)],
    ),
    "pairs": (
        SEQUENCE,
        ("no", "yes"),
        {"task": "pair-classification", "max_length": 64, "problem": "single-label"},
        {},
        [{"text": TEXT, "text_pair": "the cat"}, {"text": "the cat", "text_pair": LONG}],
    ),
    "relations": (
        SEQUENCE,
        ("born_in", "other"),
        {"task": "relation-extraction", "max_length": 64},
        {},
        [
            {"text": TEXT, **RELATION},
            {"tokens": TEXT.split(), "head": {"start": 0, "end": 1}, "tail": {"start": 4, "end": 5}},
        ],
    ),
    "entities": (
        TOKENS,
        TAGS,
        {"task": "token-classification", "max_length": 32, "stride": 8, "tag_scheme": "iob2"},
        {},
        [{"text": TEXT}, {"text": LONG}, {"tokens": LONG.split()}, {"text": "北京是中国的首都!"}],
    ),
    "answers": (
        "ForQuestionAnswering",
        (),
        {"task": "question-answering", "max_length": 48, "stride": 16},
        {},
        [{"question": " who was born?", "context": context} for context in (TEXT, LONG, "北京是中国的首都")],
    ),
    "choices": (
        "ForMultipleChoice",
        (),
        {"task": "multiple-choice", "max_length": 64},
        {},
        [{"context": TEXT, "question": "who?", "choices": ["Ada", "London", LONG]}],
    ),
}


def predict_as_the_trainer(folder: Path, head: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from fastserve.evaluate.torch_model import run_examples

    model, tokenizer = open_with_transformers(folder, head)
    task = task_of_folder(folder)
    examples = task.encode(rows, tokenizer, with_labels=False)
    logits, _ = run_examples(model, examples.features, pad_token_id=0, batch_size=2)
    return task.decode(rows, examples, logits)


@pytest.mark.parametrize("save", [save_bert_head, save_roberta_head])
@pytest.mark.parametrize("name", CASES)
def test_predictions_that_are_served_are_those_of_the_trainer(name: str, save: Any, tmp_path: Path) -> None:
    head, labels, card, options, rows = CASES[name]
    folder = save(tmp_path / "model", head, labels=labels, card=card, **options)
    expected = predict_as_the_trainer(folder, head, rows)
    with fastserve.pipeline(None, folder) as pipe:
        assert pipe.task == card["task"]
        for said, wanted in zip(pipe.predict(rows, truncate=True), expected, strict=True):
            assert_alike({key: said[key] for key in wanted}, wanted)


def assert_alike(said: Any, wanted: Any) -> None:
    """Equal, but for numbers, which are near."""
    if isinstance(wanted, float):
        assert said == pytest.approx(wanted, abs=CLOSE)
    elif isinstance(wanted, dict):
        assert {key for key in wanted if key in said} == set(wanted), (said, wanted)
        for key, value in wanted.items():
            assert_alike(said[key], value)
    elif isinstance(wanted, list):
        assert len(said) == len(wanted)
        for one, other in zip(said, wanted, strict=True):
            assert_alike(one, other)
    else:
        assert said == wanted
