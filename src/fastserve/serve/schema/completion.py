"""/v1/completions."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fastserve.serve.schema.body import Document, Usage
from fastserve.serve.schema.stream import StreamFields
from fastserve.serve.schema.text_input import TextInput

DEFAULT_MAX_TOKENS = 16  # of OpenAI's API


class CompletionRequest(StreamFields):
    model: str
    prompt: TextInput
    max_tokens: int | None = Field(
        None, description="16 by default; 0 with echo or prompt_logprobs: the prompt alone."
    )
    logprobs: int | None = Field(None, description="0 to 20: the likeliest tokens beside the chosen one.")
    prompt_logprobs: int | None = Field(None, description="As logprobs, of the tokens of the prompt.")
    echo: bool | None = Field(None, description="Answer with the prompt before the completion.")


class CompletionLogprobs(Document):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class PromptLogprob(Document):
    logprob: float
    decoded_token: str


class CompletionChoice(Document):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    finish_reason: Literal["stop", "length"]


class CompletionDocument(Document):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
