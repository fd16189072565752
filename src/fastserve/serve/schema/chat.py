"""/v1/chat/completions."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from fastserve.errors import OptionError
from fastserve.option import check_integer
from fastserve.serve.body import check_writable
from fastserve.serve.schema.body import Body, Document, Usage
from fastserve.serve.schema.stream import StreamFields
from fastserve.types import MAX_TOP_LOGPROBS


class TextPart(Body):
    type: Literal["text"]
    text: str


class FunctionCall(Body):
    name: str
    arguments: str = Field(description="A JSON object, as text.")


class ToolCall(Body):
    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = Field(None, description="Of an answer that is sent back.")

    def to_template(self) -> dict[str, Any]:
        """The message as chat templates read it: plain text, arguments as objects, `developer` by its older
        name `system`."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        message["content"] = content or ""
        if self.tool_calls is not None:
            message["tool_calls"] = [to_template_call(call) for call in self.tool_calls]
        for name in ("name", "tool_call_id", "reasoning_content"):
            if getattr(self, name) is not None:
                message[name] = getattr(self, name)
        return message


class FunctionDefinition(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="The schema of its arguments, an object.")
    strict: bool | None = Field(
        None, description="Arguments follow the schema also where the model is not forced to call."
    )


class ToolDefinition(Body):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(StreamFields):
    model: str
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, description="By default until the context is full.")
    max_tokens: int | None = Field(None, description="The older name of max_completion_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, description="0 to 20, with logprobs.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="What else the model's chat template reads, such as enable_thinking."
    )
    tools: list[ToolDefinition] | None = Field(None, description="Functions that the model may call.")
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="auto by default where there are tools."
    )
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call; true by default.")
    store: Literal[False] | None = Field(None, description="Nothing is stored.")

    @property
    def names(self) -> dict[str, str]:
        """Fields by the options that they set, where they differ."""
        return {"max_tokens": "max_completion_tokens"} if self.max_tokens is None else {}

    @property
    def most_tokens(self) -> int | None:
        """
        Raises:
            OptionError: both names are given, and differ.
        """
        newer, older = self.max_completion_tokens, self.max_tokens
        if newer is not None and older is not None and newer != older:
            raise OptionError(
                f"max_completion_tokens={newer} and max_tokens={older} differ",
                hint="send max_completion_tokens alone",
                option="max_tokens",
            )
        return older if newer is None else newer

    @property
    def num_logprobs(self) -> int | None:
        """
        Raises:
            OptionError: top_logprobs is out of range, or without logprobs.
        """
        if not self.logprobs and self.top_logprobs is not None:
            raise OptionError(
                f"top_logprobs={self.top_logprobs} has no use without logprobs=true",
                hint="send logprobs=true as well",
                option="top_logprobs",
            )
        if self.top_logprobs is not None:
            check_integer("top_logprobs", self.top_logprobs, low=0, high=MAX_TOP_LOGPROBS)
        return (self.top_logprobs or 0) if self.logprobs else None


class TopLogprob(Document):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Document):
    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(Document):
    role: Literal["assistant"]
    content: str | None = Field(description="null where the answer is calls alone.")
    refusal: None = None
    tool_calls: list[ToolCall] | None = Field(None, description="Absent where there are none.")


class ChatChoice(Document):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatDocument(Document):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


def to_template_call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments)
        check_writable(arguments)
    except (ValueError, RecursionError):
        arguments = call.function.arguments
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }
