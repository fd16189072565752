"""/v1/embeddings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fastserve.serve.schema.body import Body, Document, Name
from fastserve.serve.schema.text_input import TextInput


class EmbeddingRequest(Body):
    model: str
    input: TextInput
    encoding_format: Literal["float", "base64"] | None = Field(None, description="float by default.")
    dimensions: int | None = Field(None, description="Keep so many of the first, and normalize again.")
    truncate: bool | None = Field(None, description="Cut texts that are too long instead of refusing them.")
    user: Name | None = None


class EmbeddingObject(Document):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Document):
    prompt_tokens: int
    total_tokens: int


class EmbeddingDocument(Document):
    object: Literal["list"]
    model: str
    data: list[EmbeddingObject]
    usage: EmbeddingUsage
