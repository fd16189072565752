"""/v1/responses: OpenAI's newer API, whose conversations the server keeps."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from fastserve.errors import OptionError
from fastserve.serve.schema.body import Body, Document
from fastserve.serve.schema.chat import ToolCall, TopLogprob, to_template_call
from fastserve.serve.schema.sampling import SamplingFields

Status = Literal["completed", "incomplete", "in_progress", "cancelled", "failed"]


class ContentPart(Body):
    """Of an input message, or of an answer that is sent back."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = Field(None, max_length=0)
    logprobs: list[Any] | None = None


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    id: str | None = None
    status: Status | None = None

    def to_template(self) -> dict[str, Any]:
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": _text_of(self.content)}


class FunctionCallItem(Body):
    """A call that the model has made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str = Field(description="A JSON object, as text.")
    id: str | None = None
    status: Status | None = None

    def to_template(self) -> dict[str, Any]:
        call = ToolCall.model_validate(
            {
                "id": self.call_id,
                "type": "function",
                "function": {"name": self.name, "arguments": self.arguments},
            }
        )
        return {"role": "assistant", "content": "", "tool_calls": [to_template_call(call)]}


class FunctionCallOutput(Body):
    """What a call has given."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[ContentPart]
    id: str | None = None
    status: Status | None = None

    def to_template(self) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": self.call_id, "content": _text_of(self.output)}


def _kind_of(item: Any) -> str:
    """A message needs no type."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return kind if isinstance(kind, str) else "message"


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")],
    Discriminator(_kind_of),
]


class TextFormat(Body):
    type: Literal["text"]


class TextOptions(Body):
    format: TextFormat | None = None


class ResponsesRequest(SamplingFields):
    model: str
    input: str | list[InputItem]
    instructions: str | None = Field(
        None, description="Said before everything; not kept for the next response."
    )
    previous_response_id: str | None = Field(None, description="Go on with the conversation that it ended.")
    max_output_tokens: int | None = Field(None, description="By default until the context is full.")
    include: list[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: int | None = Field(None, description="0 to 20, with message.output_text.logprobs.")
    text: TextOptions | None = None
    stream: bool | None = None
    background: bool | None = Field(None, description="Answer at once; the response is to be retrieved.")
    store: bool | None = Field(None, description="Keep the response, in memory: the default.")
    truncation: Literal["disabled"] | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16, description="Kept with the response.")

    def to_template(self) -> list[dict[str, Any]]:
        """The messages of the input."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return [item.to_template() for item in self.input]

    @property
    def num_logprobs(self) -> int | None:
        """
        Raises:
            OptionError: top_logprobs without log-probabilities.
        """
        if not self.include and self.top_logprobs is not None:
            raise OptionError(
                f"top_logprobs={self.top_logprobs} has no use without log-probabilities",
                hint='send include=["message.output_text.logprobs"] as well',
                option="top_logprobs",
            )
        return (self.top_logprobs or 0) if self.include else None

    def check(self) -> None:
        """
        Raises:
            OptionError: fields contradict each other.
        """
        if self.n not in (None, 1):
            raise OptionError(
                f"n={self.n}: a response is one answer", hint="use /v1/chat/completions", option="n"
            )
        if self.background and self.stream:
            raise OptionError(
                "a response in the background has no stream",
                hint="send stream or background, not both",
                option="background",
            )
        if self.background and self.store is False:
            raise OptionError(
                "store=false would lose a response in the background",
                hint="leave store out",
                option="store",
            )


class OutputLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class OutputText(Document):
    type: Literal["output_text"]
    text: str
    annotations: list[str]
    logprobs: list[OutputLogprob]


class OutputMessage(Document):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["completed", "incomplete"]
    content: list[OutputText]


class IncompleteDetails(Document):
    reason: Literal["max_output_tokens"]


class ResponseError(Document):
    code: str
    message: str


class InputDetails(Document):
    cached_tokens: int


class OutputDetails(Document):
    reasoning_tokens: int


class ResponsesUsage(Document):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseDocument(Document):
    id: str
    object: Literal["response"]
    created_at: int
    status: Status
    background: bool
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool
    previous_response_id: str | None
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponsesUsage | None
    user: str | None


class DeletedResponse(Document):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


def _text_of(content: str | list[ContentPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
