"""From a row of data, as JSON lines and `fastserve.data` have it, to what its task makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from fastserve.engine.encoder import EncoderInput
from fastserve.engine.loaded_model import LoadedModel
from fastserve.engine.prompt import encode_text
from fastserve.engine.task.answer import prepare_answer, prepare_choice
from fastserve.engine.task.classification import Span, prepare_relation, prepare_text
from fastserve.engine.task.prepared import Prepared
from fastserve.engine.task.token_classification import prepare_tags
from fastserve.errors import OptionError
from fastserve.models.task import Task

Row = Mapping[str, Any]


def prepare_row(model: LoadedModel, task: Task, row: Row, *, truncate: bool = False) -> Prepared[Any]:
    """What there is to run for a row: `{"text"}`, `{"text", "text_pair"}`, `{"tokens"}`, `{"text", "head",
    "tail"}`, `{"question", "context"}` or `{"question", "choices"}`, by the task. What else it has, such as
    its label, is left alone.

    Raises:
        OptionError: a field is missing or of the wrong kind.
        ContextLengthError: a text is longer than the model's limit; not with `truncate`, and not where it can
            be cut into windows.
    """
    match task:
        case "embed":
            token_ids = encode_text(model, _text(row, "text"), truncate=truncate)
            return Prepared([EncoderInput(token_ids)], lambda found: {"embedding": found[0].tolist()})
        case "text-classification":
            pair = _text(row, "text_pair") if row.get("text_pair") is not None else None
            return prepare_text(model, _text(row, "text"), pair, truncate=truncate)
        case "pair-classification":
            return prepare_text(model, _text(row, "text"), _text(row, "text_pair"), truncate=truncate)
        case "token-classification":
            return prepare_tags(model, _texts(row, "tokens") if "tokens" in row else _text(row, "text"))
        case "relation-extraction":
            text, head, tail = relation_of(row)
            return prepare_relation(model, text, head, tail, truncate=truncate)
        case "question-answering":
            return prepare_answer(model, _text(row, "question"), _text(row, "context"))
        case "multiple-choice":
            asked = [_text(row, name) for name in ("context", "question") if row.get(name) is not None]
            if not asked:
                raise OptionError("the row has no question", hint="give each row a question, or a context")
            return prepare_choice(model, " ".join(asked), _texts(row, "choices"), truncate=truncate)
    raise OptionError(
        f"task {task!r} predicts nothing for rows", hint="use fastserve generate", option="task"
    )


def relation_of(row: Row) -> tuple[str, Span, Span]:
    """The text of a row and its two entities in characters; tokens are joined with spaces."""
    if "tokens" not in row:
        return _text(row, "text"), _span(row, "head"), _span(row, "tail")
    tokens = _texts(row, "tokens")
    starts = [0]
    for token in tokens:
        starts.append(starts[-1] + len(token) + 1)

    def in_characters(name: str) -> Span:
        span = _span(row, name)
        if not 0 <= span["start"] < span["end"] <= len(tokens):
            raise OptionError(
                f"{name} is {span['start']}:{span['end']}; the row has {len(tokens)} tokens",
                hint="give start and end in tokens, the end behind the last",
                option=name,
            )
        return {"start": starts[span["start"]], "end": starts[span["end"]] - 1}

    return " ".join(tokens), in_characters("head"), in_characters("tail")


def _text(row: Row, name: str) -> str:
    text = row.get(name)
    if not isinstance(text, str):
        raise OptionError(f"{name} is {text!r:.80}; a text was expected", hint=f"give each row its {name}")
    return text


def _texts(row: Row, name: str) -> Seq[str]:
    texts = row.get(name)
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise OptionError(f"{name} is {texts!r:.80}; a list of texts was expected")
    return texts


def _span(row: Row, name: str) -> Span:
    span = row.get(name)
    if not isinstance(span, Mapping) or any(type(span.get(edge)) is not int for edge in ("start", "end")):
        raise OptionError(
            f"{name} is {span!r:.80}; a start and an end were expected", hint=f"give each row its {name}"
        )
    return {"start": span["start"], "end": span["end"]}
