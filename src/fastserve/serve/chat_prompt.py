"""From the messages of a request to the prompt that asks for an answer: the way of all routes that chat."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from fastserve.constraint import Constraint
from fastserve.engine.loaded_model import LoadedModel
from fastserve.engine.prompt import Message, encode_chat
from fastserve.serve.chat_tools import ChatTools
from fastserve.types import JsonObject


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """What is asked of the model by a conversation that it is to answer.

    Attributes:
        constraint: what the answer must be, its calls included.
        tools: that the model may call; None: there are none.
    """

    token_ids: Seq[int]
    constraint: Constraint | None
    tools: ChatTools | None

    @property
    def skip_special_tokens(self) -> bool:
        return self.tools is None  # what marks a call may be one


async def make_chat_prompt(
    model: LoadedModel,
    messages: Seq[Message],
    *,
    tools: ChatTools | None,
    constraint: Constraint | None = None,
    variables: JsonObject | None = None,
) -> ChatPrompt:
    """The prompt of messages.

    Args:
        tools: of the request; None: it has none.
        constraint: what the text of the answer must be.
        variables: what else the chat template reads.

    Raises:
        OptionError: both the text and the calls are constrained.
        ConstraintError: the schema of a tool cannot be followed.
        TemplateError, ContextLengthError: as `encode_chat`.
    """
    if tools is not None:
        constraint = await asyncio.to_thread(tools.constrain, constraint)
    token_ids = await encode_messages(model, messages, tools=tools, variables=variables)
    return ChatPrompt(token_ids, constraint, tools if tools is not None and tools.can_call else None)


async def encode_messages(
    model: LoadedModel,
    messages: Seq[Message],
    *,
    tools: ChatTools | None,
    variables: JsonObject | None = None,
) -> Seq[int]:
    """The token ids alone. Arguments and errors as of `make_chat_prompt`."""
    shown = None
    if tools is not None:
        messages, shown = tools.tell(messages)
    return await asyncio.to_thread(encode_chat, model, messages, tools=shown, variables=variables)
