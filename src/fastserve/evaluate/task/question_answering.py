"""Finds the passage of a text that answers a question, or says that none does (Devlin et al. 2019, arXiv
1810.04805, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastserve.errors import DataError
from fastserve.evaluate.answer_match import answer_f1, exact_match
from fastserve.evaluate.task.task import Examples, Prediction, Row, Scores, place_of, softmax
from fastserve.types import Float32Array, JsonObject

MAX_ANSWER_TOKENS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionAnswering:
    """`{"context", "question", "answers": {"text": [...], "answer_start": [...]}}`; no answers where the
    context has none.

    Contexts that are longer than a model takes are cut into windows that share `stride` tokens, each with the
    question before it; a window without the answer has its first token as the answer. Offsets are characters,
    whatever the script.
    """

    max_length: int
    stride: int = 128

    name = "question-answering"
    model_class = "ForQuestionAnswering"
    labels = ()
    metrics = ("f1", "exact_match", "answerable_f1", "unanswerable_accuracy", "loss")

    def encode(self, rows: Seq[Row], tokenizer: Any, *, with_labels: bool) -> Examples:
        examples = Examples()
        for index, row in enumerate(rows):
            encoded = self._encode_row(row, tokenizer)
            for number in range(len(encoded["input_ids"])):
                features = {
                    name: encoded[name][number]
                    for name in encoded
                    if name in ("input_ids", "attention_mask", "token_type_ids")
                }
                parts = encoded.sequence_ids(number)
                offsets = [
                    offset if part == 1 else None
                    for offset, part in zip(encoded["offset_mapping"][number], parts, strict=True)
                ]
                if with_labels:
                    features["labels"] = _answer_tokens(row, offsets)
                examples.add(index, features, offsets)
        return examples

    def decode(self, rows: Seq[Row], examples: Examples, logits: Seq[Float32Array]) -> list[Prediction]:
        best = [(-1.0, 0, 0) for _ in rows]
        no_answer = [1.0] * len(rows)
        for index, offsets, values in zip(examples.row_index, examples.notes, logits, strict=True):
            score, first, last, none = _best_span(offsets, values)
            no_answer[index] = min(no_answer[index], none)
            if score > best[index][0]:
                best[index] = score, offsets[first][0], offsets[last][1]
        return [
            _prediction(row["context"], *found, none)
            for row, found, none in zip(rows, best, no_answer, strict=True)
        ]

    def score(self, rows: Seq[Row], predictions: Seq[Prediction]) -> Scores:
        answers = [_answers(row)[0] for row in rows]
        said = [prediction["answer"] for prediction in predictions]
        f1 = np.array([answer_f1(a, b) for a, b in zip(said, answers, strict=True)])
        exact = np.array([exact_match(a, b) for a, b in zip(said, answers, strict=True)])
        has_answer = np.array([bool(texts) for texts in answers])
        metrics = {"f1": float(f1.mean()), "exact_match": float(exact.mean())}
        if has_answer.any():
            metrics["answerable_f1"] = float(f1[has_answer].mean())
        if not has_answer.all():
            metrics["unanswerable_accuracy"] = float(exact[~has_answer].mean())
        return Scores(metrics)

    def config(self) -> JsonObject:
        return {"num_labels": 2}

    def settings(self) -> JsonObject:
        return {"max_length": self.max_length, "stride": self.stride}

    def _encode_row(self, row: Row, tokenizer: Any) -> Any:
        question, context = row["question"].strip(), row["context"]
        room = self.max_length - len(tokenizer(question, "", verbose=False)["input_ids"])
        if room < 8:
            raise DataError(
                f"{place_of(row)}: the question leaves {max(room, 0)} of {self.max_length} tokens to the "
                "context",
                hint="raise --max-length, or shorten the question",
            )
        return tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=self.max_length,
            stride=min(self.stride, room // 2),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )


def _answers(row: Row) -> tuple[Seq[str], Seq[int]]:
    answers = row.get("answers") or {}
    return answers.get("text") or [], answers.get("answer_start") or []


def _answer_tokens(row: Row, offsets: Seq[tuple[int, int] | None]) -> list[int]:
    """First and last token of the answer in a window; the first token of all where it has none of it."""
    texts, starts = _answers(row)
    if not texts:
        return [0, 0]
    start, end = starts[0], starts[0] + len(texts[0])
    inside = [
        place
        for place, offset in enumerate(offsets)
        if offset is not None and offset[0] < end and offset[1] > start
    ]
    whole = [offset for offset in offsets if offset is not None]
    if not inside or whole[0][0] > start or whole[-1][1] < end:
        return [0, 0]
    return [inside[0], inside[-1]]


def _best_span(offsets: Seq[tuple[int, int] | None], logits: Float32Array) -> tuple[float, int, int, float]:
    """Probability, first and last token of the likeliest passage, and the probability that there is none: of
    all pairs of ends that a window has, ends taken as independent."""
    may_be = np.array([offset is not None for offset in offsets])
    may_be[0] = True
    start, end = softmax(np.where(may_be[:, None], logits, np.float32(-np.inf)).T)  # [tokens] each
    best, none = (-1.0, 1, 1), float(start[0] * end[0])
    for length in range(1, min(MAX_ANSWER_TOKENS, len(offsets) - 1) + 1):
        scores = start[1 : len(offsets) - length + 1] * end[length:]
        first = int(scores.argmax())
        if scores[first] > best[0]:
            best = float(scores[first]), first + 1, first + length
    return *best, none


def _prediction(context: str, score: float, start: int, end: int, no_answer: float) -> Prediction:
    if no_answer > score:
        return {"answer": "", "score": no_answer, "start": 0, "end": 0, "no_answer_score": no_answer}
    text = context[start:end]
    return {"answer": text, "score": score, "start": start, "end": end, "no_answer_score": no_answer}
