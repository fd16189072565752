"""Answers to questions: a passage of a text, or none; or one of several choices."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TypedDict

import numpy as np

from fastserve.checkpoint.tokenizer import Encoding
from fastserve.engine.loaded_model import LoadedModel
from fastserve.engine.probability import softmax
from fastserve.engine.task.prepared import Prepared
from fastserve.engine.task.window import Window, cut, fit, stride_of
from fastserve.errors import OptionError
from fastserve.types import Float32Array

MAX_ANSWER_TOKENS = 30


class Answer(TypedDict):
    """`answer` is context[start:end]; empty, with both 0, where the text has none.

    `score` is the probability of its ends in its window, of all pairs of tokens and of there being no answer;
    `no_answer_score` is that there is none, the least over the windows.
    """

    answer: str
    score: float
    start: int
    end: int
    no_answer_score: float


class Choice(TypedDict):
    """The index of the likeliest choice, its text and probability, and those of all."""

    choice: int
    text: str
    score: float
    scores: list[float]


def prepare_answer(
    model: LoadedModel,
    question: str,
    context: str,
    *,
    can_be_unanswerable: bool = True,
    max_answer_tokens: int = MAX_ANSWER_TOKENS,
    stride: int | None = None,
) -> Prepared[Answer]:
    """Find the passage of a text that answers a question.

    A text longer than the model's limit is cut into windows, each with the question before it.

    Args:
        can_be_unanswerable: whether the answer may be that there is none.
        stride: tokens that neighbouring windows share; None: as the model was trained, or 64.

    Raises:
        OptionError: the text is empty.
        ContextLengthError: the question leaves no room for the text.
    """
    encoding = model.tokenizer.encode_with_origin(question.strip(), context)
    if 1 not in encoding.parts:
        raise OptionError("the context is empty", hint="give a text to find the answer in", option="context")
    stride = stride_of(model) if stride is None else stride
    windows = cut(model, encoding, part=1, stride=stride)

    def finish(logits: Seq[Float32Array]) -> Answer:
        return _find(encoding, windows, logits, context, can_be_unanswerable, max_answer_tokens)

    return Prepared([window.input for window in windows], finish)


def prepare_choice(
    model: LoadedModel, question: str, choices: Seq[str], *, truncate: bool = False
) -> Prepared[Choice]:
    """Choose one of several texts that go on from, or answer, a text.

    Raises:
        OptionError: fewer than two choices.
        ContextLengthError: with one of them, it is longer than the model's limit.
    """
    if len(choices) < 2:
        raise OptionError(
            f"there are {len(choices)} choices", hint="give at least two to choose from", option="choices"
        )
    encode = model.tokenizer.encode_with_origin
    inputs = [fit(model, encode(question, choice), truncate=truncate) for choice in choices]

    def finish(logits: Seq[Float32Array]) -> Choice:
        scores = softmax(np.concatenate(logits))
        best = int(scores.argmax())
        return {
            "choice": best,
            "text": choices[best],
            "score": float(scores[best]),
            "scores": scores.tolist(),
        }

    return Prepared(inputs, finish)


def _find(
    encoding: Encoding,
    windows: Seq[Window],
    logits: Seq[Float32Array],
    context: str,
    can_be_unanswerable: bool,
    max_answer_tokens: int,
) -> Answer:
    best = (-1.0, 0, 0)
    no_answer = 1.0
    for window, rows in zip(windows, logits, strict=True):
        tokens = np.asarray(window.tokens)
        may_be = np.array([encoding.parts[token] == 1 for token in tokens])
        may_be[0] = True  # the first token stands for no answer
        masked = np.where(may_be[:, None], rows, np.float32(-np.inf))
        start, end = softmax(masked.T)  # [tokens] each
        no_answer = min(no_answer, float(start[0] * end[0]))
        offsets = encoding.offsets
        for length in range(1, min(max_answer_tokens, len(tokens) - 1) + 1):
            scores = start[1 : len(tokens) - length + 1] * end[length:]
            first = int(scores.argmax())
            if scores[first] > best[0]:
                last = tokens[first + length]
                best = (float(scores[first]), offsets[tokens[first + 1]][0], offsets[last][1])
    if can_be_unanswerable and no_answer > best[0]:
        return {"answer": "", "score": no_answer, "start": 0, "end": 0, "no_answer_score": no_answer}
    score, begin, stop = best
    return {
        "answer": context[begin:stop],
        "score": score,
        "start": begin,
        "end": stop,
        "no_answer_score": no_answer,
    }
