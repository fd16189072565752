"""What tasks make of rows: logits that say what the labels say are decoded to what the rows say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastserve.errors import DataError
from fastserve.evaluate.task.collate import collate
from fastserve.evaluate.task.question_answering import QuestionAnswering
from fastserve.evaluate.task.relation_extraction import RelationExtraction
from fastserve.evaluate.task.task import IGNORED, Examples
from fastserve.evaluate.task.text_classification import TextClassification
from fastserve.evaluate.task.token_classification import TokenClassification


@pytest.fixture(scope="module")
def tokenizer(tiny_encoder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_encoder)


def sure_of_tokens(examples: Examples, num_labels: int) -> list[Any]:
    """Logits of a model that is sure of each token's label."""
    return [
        np.where(
            np.arange(num_labels) == np.maximum(np.array(features["labels"]), 0)[:, None], 9.0, 0.0
        ).astype(np.float32)
        for features in examples.features
    ]


def sure_of_ends(examples: Examples) -> list[Any]:
    """Logits of a model that is sure of the first and last token of the answer."""
    found = []
    for features in examples.features:
        logits = np.zeros((len(features["input_ids"]), 2), np.float32)
        logits[features["labels"], [0, 1]] = 20.0
        found.append(logits)
    return found


def test_long_sentences_are_tagged_through_windows_that_overlap(tokenizer: Any) -> None:
    tokens = ["Ann", "met", "Bob", "in", "Paris", "."] * 12
    tags = ["B-PER", "O", "B-PER", "O", "B-LOC", "O"] * 12
    rows = [{"tokens": tokens, "tags": tags}, {"tokens": ["Rome"], "tags": ["B-LOC"]}]
    task = TokenClassification.from_rows(rows, max_length=16, stride=4)
    examples = task.encode(rows, tokenizer, with_labels=True)
    assert examples.row_index.count(0) > 5
    predictions = task.decode(rows, examples, sure_of_tokens(examples, len(task.labels)))
    assert [prediction["tags"] for prediction in predictions] == [row["tags"] for row in rows]
    scores = task.score(rows, predictions)
    assert scores.metrics["f1"] == scores.metrics["accuracy"] == 1.0


def test_entities_of_a_text_are_found_by_their_characters(tokenizer: Any) -> None:
    text = "Ann was in Paris, Bob in 北京."
    rows = [
        {
            "text": text,
            "entities": [
                {"start": 0, "end": 3, "label": "PER"},
                {"start": 11, "end": 16, "label": "LOC"},
                {"start": text.index("北"), "end": text.index("北") + 2, "label": "LOC"},
            ],
        }
    ]
    task = TokenClassification.from_rows(rows, max_length=64)
    examples = task.encode(rows, tokenizer, with_labels=True)
    [prediction] = task.decode(rows, examples, sure_of_tokens(examples, len(task.labels)))
    found = [text[entity["start"] : entity["end"]] for entity in prediction["entities"]]
    assert found == ["Ann", "Paris", "北京"]
    assert task.score(rows, [prediction]).metrics["f1"] == 1.0


@pytest.mark.parametrize(
    ("context", "answer"), [("the film was good . Ann was in Rome .", "Rome"), ("Ann 在北京在京", "北京")]
)
def test_an_answer_is_found_in_the_window_that_has_it_whatever_the_script(
    context: str, answer: str, tokenizer: Any
) -> None:
    long = "the film was bad . " * 6 + context + " the film was bad ." * 6
    answers = {"text": [answer], "answer_start": [long.index(answer)]}
    rows = [
        {"question": "where is Ann ?", "context": long, "answers": answers},
        {"question": "where ?", "context": "a film .", "answers": {"text": [], "answer_start": []}},
    ]
    task = QuestionAnswering(max_length=24, stride=6)
    examples = task.encode(rows, tokenizer, with_labels=True)
    assert examples.row_index.count(0) > 3
    predictions = task.decode(rows, examples, sure_of_ends(examples))
    assert [prediction["answer"] for prediction in predictions] == [answer, ""]
    start = predictions[0]["start"]
    assert long[start : start + len(answer)] == answer
    assert task.score(rows, predictions).metrics == pytest.approx(
        {"f1": 1.0, "exact_match": 1.0, "answerable_f1": 1.0, "unanswerable_accuracy": 1.0}
    )


def test_a_question_that_leaves_no_room_for_the_context_is_refused(tokenizer: Any) -> None:
    rows = [{"question": "where " * 30, "context": "in Rome", "answers": {}}]
    with pytest.raises(DataError, match="leaves 0 of 24 tokens to the context"):
        QuestionAnswering(max_length=24).encode(rows, tokenizer, with_labels=True)


def test_entities_that_overlap_are_refused_with_their_place() -> None:
    spans = {"head": {"start": 0, "end": 5}, "tail": {"start": 3, "end": 8}}
    task = RelationExtraction(labels=("a", "b"), max_length=16)
    with pytest.raises(DataError, match="a row: head and tail overlap"):
        task.encode([{"text": "Ann met Bob", **spans, "label": "a"}], None, with_labels=True)


def test_texts_that_are_cut_are_counted(tokenizer: Any) -> None:
    rows = [{"text": "good " * 30, "label": "y"}, {"text": "bad", "label": "n"}]
    task = TextClassification.from_rows(rows, max_length=16, is_pair=False)
    examples = task.encode(rows, tokenizer, with_labels=True)
    assert examples.num_cut == 1
    assert len(examples.features[0]["input_ids"]) == 16


@pytest.mark.parametrize(
    ("labels", "problem"),
    [([0, 1, 10, 2], "single-label"), ([0.5, 1.0], "regression"), (["b", "a"], "single-label")],
)
def test_what_a_classification_is_about_follows_from_its_labels(labels: list[Any], problem: str) -> None:
    rows = [{"text": "a", "label": label} for label in labels]
    task = TextClassification.from_rows(rows, max_length=16, is_pair=False)
    assert task.problem == problem
    expected = {"regression": ("value",)}.get(problem, tuple(str(label) for label in sorted(labels)))
    assert task.labels == expected


def test_training_rows_of_one_label_are_refused() -> None:
    rows = [{"text": "a", "label": "spam"}] * 3
    with pytest.raises(DataError, match="all training rows have the label 'spam'"):
        TextClassification.from_rows(rows, max_length=16, is_pair=False)


def test_batches_are_padded_by_what_each_input_means() -> None:
    features = [{"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [1, 2]}]
    features.append({"input_ids": [7], "attention_mask": [1], "labels": [3]})
    batch = collate(features, pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[1, 2], [3, IGNORED]]
