"""The tools of one chat request: told to the model, forced where that is asked for, and read from its
answers."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from fastserve.constraint import Constraint
from fastserve.engine.loaded_model import LoadedModel
from fastserve.engine.prompt import Message
from fastserve.errors import OptionError
from fastserve.serve.tools.call_constraint import call_constraint
from fastserve.serve.tools.format import ToolFormat, detect_format, tell_tools
from fastserve.serve.tools.parser import ToolParser
from fastserve.serve.tools.tool import Tool, ToolChoice, parse_tool_choice, parse_tools
from fastserve.types import JsonObject


@dataclass(frozen=True, slots=True)
class ChatTools:
    """Empty `tools`: the request has none."""

    tools: Seq[Tool]
    choice: ToolChoice
    format_: ToolFormat
    is_parallel: bool

    @classmethod
    def of(
        cls,
        model: LoadedModel,
        tools: Seq[JsonObject] | None,
        choice: str | JsonObject | None,
        is_parallel: bool | None,
        *,
        has_calls: bool,
    ) -> ChatTools | None:
        """None where a request names no tools and no choice, and has no calls of earlier turns, of which a
        template may know nothing.

        Raises:
            OptionError: a tool or the choice is malformed.
            UnsupportedError: the model writes calls in a way that we do not read.
        """
        if tools is None and choice is None and is_parallel is None and not has_calls:
            return None
        parsed = parse_tools(tools or ())
        if not parsed and is_parallel is not None:
            raise OptionError(
                f"parallel_tool_calls={is_parallel} has no use without tools",
                hint="send tools as well",
                option="parallel_tool_calls",
            )
        chosen = parse_tool_choice(choice, parsed)
        format_ = detect_format(model.checkpoint.chat_template, model.tokenizer)
        return cls(parsed, chosen, format_, is_parallel is not False)

    @property
    def can_call(self) -> bool:
        return self.choice.kind != "none"

    def tell(self, messages: Seq[Message]) -> tuple[Seq[Message], Seq[JsonObject] | None]:
        """What the chat template gets: messages and tools."""
        return tell_tools(messages, self.tools, self.format_, self.choice)

    def constrain(self, constraint: Constraint | None) -> Constraint | None:
        """What the completion must be, where its text must be `constraint`.

        Raises:
            OptionError: both the text and the calls are constrained.
            ConstraintError: a schema cannot be followed.
        """
        if not self.can_call:
            return constraint
        if constraint is not None:
            raise OptionError(
                "what the text must be contradicts tools that may be called",
                hint='send tool_choice="none", or leave the format of the text out',
                option="tool_choice",
            )
        return call_constraint(self.tools, self.choice, self.format_, is_parallel=self.is_parallel)

    def parser(self) -> ToolParser:
        """For one completion."""
        return ToolParser(self.format_, self.tools)
