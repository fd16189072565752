"""/v1/answer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fastserve.serve.schema.body import Body, Document, Name
from fastserve.serve.schema.embedding import EmbeddingUsage

Texts = Annotated[list[str], Field(min_length=1)]


class AnswerRequest(Body):
    model: str
    question: str | Texts
    context: str | Texts | None = Field(
        None, description="The text that has the answer, one for all questions or one for each."
    )
    choices: Texts | Annotated[list[Texts], Field(min_length=1)] | None = Field(
        None, description="Instead of context, texts to choose from, the same for all questions or of each."
    )
    can_be_unanswerable: bool | None = Field(
        None, description="Whether the answer may be that there is none; true by default."
    )
    max_answer_tokens: int | None = Field(None, description="Of an answer in context; 30 by default.")
    stride: int | None = Field(
        None,
        description="Tokens that neighbouring windows of a long context share; by default as the model was "
        "trained.",
    )
    truncate: bool | None = Field(None, description="Cut choices that are too long instead of refusing them.")
    user: Name | None = None


class AnswerObject(Document):
    """`answer` is context[start:end], empty where there is none. Of choices, `choice` is its index, and
    `scores` are those of all."""

    object: Literal["answer"]
    index: int
    answer: str
    score: float
    start: int | None = None
    end: int | None = None
    no_answer_score: float | None = None
    choice: int | None = None
    scores: list[float] | None = None


class AnswerDocument(Document):
    object: Literal["list"]
    model: str
    data: list[AnswerObject]
    usage: EmbeddingUsage
