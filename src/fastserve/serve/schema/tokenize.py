"""/tokenize, /detokenize and /apply-template."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from fastserve.serve.schema.body import Body, Document
from fastserve.serve.schema.chat import Message


class TokenizeRequest(Body):
    model: str
    prompt: str
    add_special_tokens: bool | None = Field(
        None, description="As a prompt of /v1/completions; true by default."
    )
    return_token_strs: bool | None = Field(None, description="Answer with the tokens' texts too.")


class TokenizeDocument(Document):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    model: str
    tokens: list[int]
    skip_special_tokens: bool | None = Field(
        None, description="Leave tokens out that are no text; false by default."
    )


class DetokenizeDocument(Document):
    prompt: str


class TemplateRequest(Body):
    model: str
    messages: list[Message] = Field(min_length=1)
    add_generation_prompt: bool | None = Field(
        None, description="End where the answer begins; true by default."
    )
    chat_template_kwargs: dict[str, Any] | None = None


class TemplateDocument(Document):
    prompt: str
