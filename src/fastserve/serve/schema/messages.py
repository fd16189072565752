"""/v1/messages: Anthropic's API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from fastserve.serve.schema.body import Body, Document


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
    is_error: bool | None = None
    cache_control: CacheControl | None = None


Block = Annotated[TextBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class Turn(Body):
    role: Literal["user", "assistant"]
    content: str | list[Block]

    def to_template(self) -> list[dict[str, Any]]:
        """As chat templates read it: results of tools are messages of their own, before the text."""
        if isinstance(self.content, str):
            return [{"role": self.role, "content": self.content}]
        messages: list[dict[str, Any]] = [
            {"role": "tool", "tool_call_id": block.tool_use_id, "content": text_of(block.content)}
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


class Metadata(Body):
    user_id: str | None = Field(None, description="The tenant: tenants share the model fairly.")


class Conversation(Body):
    """What is read before the answer."""

    model: str
    messages: list[Turn] = Field(min_length=1)
    system: str | list[TextBlock] | None = None

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


class TextDocument(Document):
    type: Literal["text"]
    text: str


class MessagesUsage(Document):
    input_tokens: int
    output_tokens: int


class MessageDocument(Document):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextDocument]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence"]
    stop_sequence: str | None
    usage: MessagesUsage


class TokenCount(Document):
    input_tokens: int


def text_of(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)
