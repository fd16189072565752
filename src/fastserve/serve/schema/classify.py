"""/v1/classify, /v1/token-classify and /v1/relations."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fastserve.serve.schema.body import Body, Document, Name
from fastserve.serve.schema.embedding import EmbeddingUsage

Texts = Annotated[list[str], Field(min_length=1)]
_TRUNCATE = "Cut texts that are too long instead of refusing them."
_STRIDE = "Tokens that neighbouring windows of a long text share; by default as the model was trained."


class ClassifyRequest(Body):
    model: str
    input: str | Texts
    text_pair: str | Texts | None = Field(None, description="A second text for each of input.")
    truncate: bool | None = Field(None, description=_TRUNCATE)
    user: Name | None = None


class ClassificationObject(Document):
    """`label` and `score` of a model of which a text has one; `labels` where it may have several; `value` of
    one that gives a number, `values` of several."""

    object: Literal["classification"]
    index: int
    label: str | None = None
    score: float | None = None
    labels: list[str] | None = None
    probabilities: dict[str, float] | None = None
    value: float | None = None
    values: dict[str, float] | None = None


class ClassifyDocument(Document):
    object: Literal["list"]
    model: str
    data: list[ClassificationObject]
    usage: EmbeddingUsage


class TokenClassifyRequest(Body):
    model: str
    input: str | Texts | None = Field(None, description="One text or several.")
    tokens: Texts | Annotated[list[Texts], Field(min_length=1)] | None = Field(
        None, description="Instead of input, the words of one text or of several."
    )
    stride: int | None = Field(None, description=_STRIDE)
    user: Name | None = None


class EntityObject(Document):
    """In characters of its text, text[start:end]; of words that were given, by their indices."""

    label: str
    score: float
    start: int | None = None
    end: int | None = None
    text: str | None = None
    first_token: int | None = None
    end_token: int | None = None


class TaggingObject(Document):
    object: Literal["token_classification"]
    index: int
    entities: list[EntityObject]
    tokens: list[str]
    tags: list[str]
    scores: list[float]


class TokenClassifyDocument(Document):
    object: Literal["list"]
    model: str
    data: list[TaggingObject]
    usage: EmbeddingUsage


class SpanBody(Body):
    """In characters: text[start:end]."""

    start: int
    end: int


class RelationBody(Body):
    text: str
    head: SpanBody
    tail: SpanBody


class RelationsRequest(Body):
    model: str
    input: RelationBody | Annotated[list[RelationBody], Field(min_length=1)]
    truncate: bool | None = Field(None, description=_TRUNCATE)
    user: Name | None = None
