"""/v1/score and /v1/rerank."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fastserve.serve.schema.body import Body, Document, Name
from fastserve.serve.schema.embedding import EmbeddingUsage

Texts = Annotated[list[str], Field(min_length=1)]


class ScoreRequest(Body):
    model: str
    text_1: str | Texts = Field(description="One text, or one for each of text_2.")
    text_2: str | Texts
    truncate: bool | None = Field(None, description="Cut texts that are too long instead of refusing them.")
    user: Name | None = None


class ScoreObject(Document):
    object: Literal["score"]
    index: int
    score: float


class ScoreDocument(Document):
    object: Literal["list"]
    model: str
    data: list[ScoreObject]
    usage: EmbeddingUsage


class RerankRequest(Body):
    model: str
    query: str
    documents: Texts
    top_n: int | None = Field(None, description="So many of the best; by default all.")
    return_documents: bool | None = Field(None, description="Answer with the texts too; true by default.")
    truncate: bool | None = Field(None, description="Cut texts that are too long instead of refusing them.")
    user: Name | None = None


class RerankText(Document):
    text: str


class RerankResult(Document):
    index: int
    relevance_score: float
    document: RerankText | None = None


class RerankDocument(Document):
    id: str
    model: str
    results: list[RerankResult]
    usage: EmbeddingUsage
