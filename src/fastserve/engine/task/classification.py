"""A label, several, or a number for a text, for a pair of texts, or for two entities in a text."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any, TypedDict

from fastserve.checkpoint.tokenizer import Encoding
from fastserve.engine.loaded_model import LoadedModel
from fastserve.engine.probability import shares_of
from fastserve.engine.task.prepared import Prepared
from fastserve.engine.task.window import fit
from fastserve.errors import CheckpointError, OptionError
from fastserve.models.task import TaskSettings
from fastserve.types import Float32Array, Float64Array

THRESHOLD = 0.5  # from which probability on a text has one of several labels

# Around the head and the tail of a relation, where fastserve.json has no `markers`.
MARKERS = ("[E1]", "[/E1]", "[E2]", "[/E2]")


class Classification(TypedDict, total=False):
    """`label` with its `score` where a text has one, `labels` where it may have several, and the
    `probabilities` of all; of regression the `value` alone, or `values` by label."""

    label: str
    score: float
    labels: list[str]
    probabilities: dict[str, float]
    value: float
    values: dict[str, float]


class Span(TypedDict):
    """A part of a text, in characters: text[start:end]."""

    start: int
    end: int


def prepare_text(
    model: LoadedModel, text: str, pair: str | None = None, *, truncate: bool = False
) -> Prepared[Classification]:
    """Classify a text, or two as a pair.

    Raises:
        ContextLengthError: they are longer than the model's limit.
    """
    return _prepare(model, lambda member: member.tokenizer.encode_with_origin(text, pair), truncate=truncate)


def prepare_relation(
    model: LoadedModel, text: str, head: Span, tail: Span, *, truncate: bool = False
) -> Prepared[Classification]:
    """Classify the relation between two entities of a text.

    Raises:
        OptionError: an entity is not within the text, or they overlap.
        ContextLengthError: as `prepare_text`.
    """

    def encode(member: LoadedModel) -> Encoding:
        return member.tokenizer.encode_with_origin(mark(text, head, tail, markers_of(member)))

    return _prepare(model, encode, truncate=truncate)


def markers_of(model: LoadedModel) -> Seq[str]:
    """What stands before and after the head, and before and after the tail, of a model for relations."""
    markers: Any = model.checkpoint.card.get("markers", MARKERS)
    is_known = isinstance(markers, list | tuple) and len(markers) == 4
    if not is_known or not all(isinstance(marker, str) for marker in markers):
        raise CheckpointError(
            f"fastserve.json has markers={markers!r}", hint="four texts are expected, around head and tail"
        )
    return tuple(markers)


def mark(text: str, head: Span, tail: Span, markers: Seq[str]) -> str:
    """The text with markers around two entities.

    >>> mark("Ada was born in London", {"start": 0, "end": 3}, {"start": 16, "end": 22}, MARKERS)
    '[E1] Ada [/E1] was born in [E2] London [/E2]'
    """
    for name, span in (("head", head), ("tail", tail)):
        if not 0 <= span["start"] < span["end"] <= len(text):
            raise OptionError(
                f"{name} is {span['start']}:{span['end']}; the text has {len(text)} characters",
                hint="give start and end in characters, the end behind the last",
                option=name,
            )
    spans = [(head, markers[0], markers[1]), (tail, markers[2], markers[3])]
    spans.sort(key=lambda entry: entry[0]["start"])
    if spans[0][0]["end"] > spans[1][0]["start"]:
        raise OptionError("head and tail overlap", hint="give two entities apart", option="tail")
    marked, position = "", 0
    for span, before, after in spans:
        marked += text[position : span["start"]]
        marked += f"{before} {text[span['start'] : span['end']]} {after}"
        position = span["end"]
    return marked + text[position:]


def _prepare(
    model: LoadedModel, encode: Callable[[LoadedModel], Encoding], *, truncate: bool
) -> Prepared[Classification]:
    """An input for each member of an ensemble; of another model one."""
    inputs = [fit(member, encode(member), truncate=truncate) for member in model.members]

    def finish(logits: Seq[Float32Array]) -> Classification:
        said = [
            shares_of(member.settings, values) for member, values in zip(model.members, logits, strict=True)
        ]
        return classify(model.settings, said[0] if model.ensemble is None else model.ensemble.mix(said))

    return Prepared(inputs, finish)


def classify(settings: TaskSettings, shares: Float64Array) -> Classification:
    """What probabilities [labels] of a text say, or the numbers of regression."""
    labels = settings.labels
    if settings.problem_type == "regression":
        if len(labels) == 1:
            return {"value": float(shares[0])}
        return {"values": dict(zip(labels, map(float, shares), strict=True))}
    probabilities = dict(zip(labels, shares.tolist(), strict=True))
    if settings.problem_type == "multi_label_classification":
        chosen = [label for label, share in probabilities.items() if share >= THRESHOLD]
        return {"labels": chosen, "probabilities": probabilities}
    best = int(shares.argmax())
    return {"label": labels[best], "score": float(shares[best]), "probabilities": probabilities}
