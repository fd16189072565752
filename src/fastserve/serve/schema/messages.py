"""/v1/messages: Anthropic's API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from fastserve.errors import OptionError
from fastserve.serve.schema.body import Body, Document, Name


class CacheControl(Body):
    """Says that a prefix comes again. All are kept while memory lasts: nothing follows from it."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Body):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None


class ToolUseBlock(Body):
    """A call that the model has made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None


class ToolResultBlock(Body):
    """What a call has given."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] = ""
    is_error: bool | None = Field(None, description="The model is told so.")
    cache_control: CacheControl | None = None

    def to_text(self) -> str:
        return f"Error: {text_of(self.content)}" if self.is_error else text_of(self.content)


Block = Annotated[TextBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class Turn(Body):
    role: Literal["user", "assistant"]
    content: str | Annotated[list[Block], Field(min_length=1)]

    def to_template(self) -> list[dict[str, Any]]:
        """As chat templates read it: results of tools are messages of their own, before the text."""
        if isinstance(self.content, str):
            return [{"role": self.role, "content": self.content}]
        messages: list[dict[str, Any]] = [
            {"role": "tool", "tool_call_id": block.tool_use_id, "content": block.to_text()}
            for block in self.content
            if isinstance(block, ToolResultBlock)
        ]
        texts = [block for block in self.content if isinstance(block, TextBlock)]
        calls = [
            {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}
            for block in self.content
            if isinstance(block, ToolUseBlock)
        ]
        if texts or calls:
            message: dict[str, Any] = {"role": self.role, "content": text_of(texts)}
            messages.append(message | ({"tool_calls": calls} if calls else {}))
        return messages


class ToolDefinition(Body):
    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = Field(None, description="The input follows the schema, be the call forced or not.")
    cache_control: CacheControl | None = None

    def to_function(self) -> dict[str, Any]:
        """As OpenAI's API has it."""
        function = {"name": self.name, "description": self.description or "", "parameters": self.input_schema}
        return {"type": "function", "function": {**function, "strict": self.strict}}


class FreeChoice(Body):
    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool | None = None


class NamedChoice(Body):
    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = None


class Metadata(Body):
    user_id: Name | None = Field(
        None, description="Where there are no keys, the tenant: tenants share the model fairly."
    )


class Conversation(Body):
    """What is read before the answer."""

    model: str
    messages: list[Turn] = Field(min_length=1)
    system: str | list[TextBlock] | None = None
    tools: list[ToolDefinition] | None = Field(None, description="Functions that the model may call.")
    tool_choice: FreeChoice | NamedChoice | None = Field(
        None, description="auto by default; any forces a call, tool that of one name.", discriminator="type"
    )

    @property
    def functions(self) -> list[dict[str, Any]] | None:
        """The tools as OpenAI's API has them."""
        return None if self.tools is None else [tool.to_function() for tool in self.tools]

    @property
    def function_choice(self) -> str | dict[str, Any] | None:
        """Which of them, as OpenAI's API has it."""
        match self.tool_choice:
            case NamedChoice(name=name):
                return {"type": "function", "function": {"name": name}}
            case FreeChoice(type=kind):
                return "required" if kind == "any" else kind
        return None

    @property
    def has_calls(self) -> bool:
        """Whether earlier turns have calls."""
        blocks = (block for turn in self.messages if isinstance(turn.content, list) for block in turn.content)
        return any(isinstance(block, ToolUseBlock) for block in blocks)

    def to_template(self) -> list[dict[str, Any]]:
        system = [] if not self.system else [{"role": "system", "content": text_of(self.system)}]
        return [*system, *(message for turn in self.messages for message in turn.to_template())]


class MessagesRequest(Conversation):
    max_tokens: int = Field(description="Most tokens of the answer.")
    stop_sequences: list[str] | None = Field(None, description="End the answer, which is left without them.")
    stream: bool | None = None
    temperature: float | None = Field(None, description="0 is greedy; 1 by default.")
    top_k: int | None = Field(None, description="Choose among so many tokens; 0 is off.")
    top_p: float | None = Field(None, description="Above 0, at most 1, which is the default and off.")
    metadata: Metadata | None = None

    def check(self) -> None:
        """
        Raises:
            OptionError: the answer is to go on from a beginning.
        """
        if self.messages[-1].role == "assistant":
            raise OptionError(
                "the last of the messages is the assistant's: an answer cannot be begun for it",
                hint="end with a message of the user",
                option="messages",
            )


class TextDocument(Document):
    type: Literal["text"]
    text: str


class ToolUseDocument(Document):
    """A call. Where the answer was cut within it, the input is empty."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessagesUsage(Document):
    input_tokens: int
    output_tokens: int


class MessageDocument(Document):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextDocument | ToolUseDocument]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessagesUsage


class TokenCount(Document):
    input_tokens: int


def text_of(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)
