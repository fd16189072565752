"""/v1/responses: OpenAI's newer API, whose conversations the server keeps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from fastserve.constraint import ANY_OBJECT, Constraint, JsonSchema
from fastserve.errors import OptionError
from fastserve.serve.schema.body import Body, Document
from fastserve.serve.schema.chat import ToolCall, TopLogprob, to_template_call
from fastserve.serve.schema.constraint import ObjectFormat, TextFormat
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


class SchemaFormat(Body):
    """JSON that a schema accepts, `strict` or not."""

    model_config = ConfigDict(serialize_by_alias=True)

    type: Literal["json_schema"]
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    format: TextFormat | ObjectFormat | SchemaFormat | None = Field(
        None, description="What the text must be.", discriminator="type"
    )


class FunctionTool(Body):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="The schema of its arguments, an object.")
    strict: bool | None = Field(None, description="Arguments follow it, be the call forced or not.")

    def to_function(self) -> dict[str, Any]:
        """As chats have it."""
        return {"type": "function", "function": self.model_dump(exclude={"type"}, exclude_none=True)}


class NamedFunctionTool(Body):
    type: Literal["function"]
    name: str


class ResponsesRequest(SamplingFields):
    model: str
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = Field(
        None, description="Said before everything; not kept for the next response."
    )
    previous_response_id: str | None = Field(None, description="Go on with the conversation that it ended.")
    max_output_tokens: int | None = Field(None, description="By default until the context is full.")
    include: list[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: int | None = Field(None, description="0 to 20, with message.output_text.logprobs.")
    text: TextOptions | None = None
    tools: list[FunctionTool] | None = Field(None, description="Functions that the model may call.")
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | None = Field(
        None, description="auto by default where there are tools."
    )
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call; true by default.")
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

    def constraints(self) -> dict[str, Callable[[], Constraint]]:
        found = super().constraints()
        match self.text and self.text.format:
            case ObjectFormat():
                found["text.format"] = lambda: ANY_OBJECT
            case SchemaFormat(schema_=schema):
                found["text.format"] = partial(JsonSchema, schema)
        return found

    @property
    def format_document(self) -> dict[str, Any]:
        """`text.format` as the answer repeats it."""
        format_ = self.text and self.text.format
        return format_.model_dump(exclude_none=True) if format_ else {"type": "text"}

    @property
    def function_choice(self) -> str | dict[str, Any] | None:
        """Which of the tools, as chats have it."""
        if isinstance(self.tool_choice, NamedFunctionTool):
            return {"type": "function", "function": {"name": self.tool_choice.name}}
        return self.tool_choice

    @property
    def tool_choice_document(self) -> str | dict[str, Any]:
        """`tool_choice` as the answer repeats it."""
        choice = self.tool_choice or "auto"
        return choice.model_dump() if isinstance(choice, NamedFunctionTool) else choice

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


class OutputFunctionCall(Document):
    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: Literal["completed", "incomplete"]


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
    output: list[OutputMessage | OutputFunctionCall]
    parallel_tool_calls: bool
    previous_response_id: str | None
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
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
