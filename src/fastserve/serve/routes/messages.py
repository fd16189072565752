"""/v1/messages: answers to conversations, by Anthropic's API."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from itertools import groupby
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fastserve.engine.completion import Chunk, Completion
from fastserve.engine.loaded_model import LoadedModel
from fastserve.errors import FastServeError
from fastserve.serve.body import check_writable
from fastserve.serve.chat_prompt import ChatPrompt, encode_messages, make_chat_prompt
from fastserve.serve.chat_tools import ChatTools
from fastserve.serve.errors import error_object, naming
from fastserve.serve.generation import Generation, GenerationRequest
from fastserve.serve.schema.body import ERRORS, STREAMED
from fastserve.serve.schema.messages import Conversation, MessageDocument, MessagesRequest, TokenCount
from fastserve.serve.security import tenant_of
from fastserve.serve.service import Service
from fastserve.serve.stream import event, json_response, to_json_text
from fastserve.serve.tools.parser import CallStart, Event, TextDelta, ToolParser, join_events
from fastserve.types import SamplingParams

_NAMES = {  # of Anthropic's fields, by the options that they set
    "stop": "stop_sequences",
    "tenant": "metadata.user_id",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}


def messages_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["generate"], responses=ERRORS)

    @router.post("/v1/messages", response_model=MessageDocument, responses=STREAMED)
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        body.check()
        async with service.generator(body.model, request) as llm:
            with naming(_NAMES, prompt="messages", constraint="tools"):
                prompt = await make_chat_prompt(
                    llm.model, body.to_template(), tools=_to_tools(body, llm.model)
                )
                asked = GenerationRequest(
                    prompts=[prompt.token_ids],
                    params=_to_params(body, prompt),
                    tenant=tenant_of(request.scope, body.metadata.user_id if body.metadata else None),
                )
                format_ = MessagesFormat(body.model, tools=prompt.tools)
                return await service.answer(llm, asked, format_, request, is_streamed=bool(body.stream))

    @router.post("/v1/messages/count_tokens", response_model=TokenCount)
    async def count_tokens(body: Conversation, request: Request) -> Response:
        """How many tokens a conversation has for the model."""
        async with service.generator(body.model, request) as llm:
            with naming(_NAMES, prompt="messages", constraint="tools"):
                tools = _to_tools(body, llm.model)
                token_ids = await encode_messages(llm.model, body.to_template(), tools=tools)
        return json_response({"input_tokens": len(token_ids)})

    return router


def _to_tools(body: Conversation, model: LoadedModel) -> ChatTools | None:
    is_single = None if body.tool_choice is None else body.tool_choice.disable_parallel_tool_use
    return ChatTools.of(
        model,
        body.functions,
        body.function_choice,
        None if is_single is None else not is_single,
        has_calls=body.has_calls,
    )


def _to_params(body: MessagesRequest, prompt: ChatPrompt) -> SamplingParams:
    """
    Raises:
        OptionError: a field is out of its range.
    """
    fields: dict[str, Any] = {"top_k": body.top_k, "top_p": body.top_p, "stop": body.stop_sequences}
    return SamplingParams(
        max_tokens=body.max_tokens,
        constraint=prompt.constraint,
        skip_special_tokens=prompt.skip_special_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,  # Anthropic's default
        **{name: value for name, value in fields.items() if value is not None},
    )


class MessagesFormat:
    """`message` and its events. A stream begins with the prompt's tokens and ends with the answer's; between
    them are blocks, one after the other: text, and each call.

    Args:
        tools: that the model may call; None: there are none.
    """

    def __init__(self, model: str, *, tools: ChatTools | None) -> None:
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
        }
        self._stop: Mapping[str, Any] = {}
        self._tools = tools
        self._parser = None if tools is None else tools.parser()
        self._num_blocks = 0  # begun so far
        self._is_text = False  # the one that has begun last

    def begin(self, generation: Generation) -> bytes:
        usage = {"input_tokens": generation.usage.prompt_tokens, "output_tokens": 0}
        message: dict[str, Any] = {
            **self._head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        return _event("message_start", message=message)

    def chunk(self, index: int, chunk: Chunk) -> bytes:
        events: list[Event] = [TextDelta(chunk.text)] if chunk.text else []
        if self._parser is not None:
            events = self._parser.feed(chunk.text)
            events += self._parser.finish() if chunk.completion is not None else []
        if chunk.completion is not None:
            self._stop = _to_stop(chunk.completion, self._parser)
        return b"".join(map(self._to_event, events))

    def end(self, generation: Generation) -> bytes:
        usage = {"output_tokens": generation.usage.completion_tokens}
        return b"".join(
            (
                self._begin_block(_text_block("")) if not self._num_blocks else b"",
                self._end_block(),
                _event("message_delta", delta=self._stop, usage=usage),
                _event("message_stop"),
            )
        )

    def _to_event(self, event: Event) -> bytes:
        if isinstance(event, CallStart):
            self._is_text = False
            return self._begin_block(_call_block(event.name, {}))
        begun = b""
        if isinstance(event, TextDelta):
            if not self._is_text:
                self._is_text = True
                begun = self._begin_block(_text_block(""))
            delta = {"type": "text_delta", "text": event.text}
        else:
            delta = {"type": "input_json_delta", "partial_json": event.text}
        return begun + _event("content_block_delta", index=self._num_blocks - 1, delta=delta)

    def _begin_block(self, block: Mapping[str, Any]) -> bytes:
        before = self._end_block() if self._num_blocks else b""
        self._num_blocks += 1
        return before + _event("content_block_start", index=self._num_blocks - 1, content_block=block)

    def _end_block(self) -> bytes:
        return _event("content_block_stop", index=self._num_blocks - 1)

    def error(self, error: FastServeError) -> bytes:
        return _event("error", error=error_object(error))

    def document(self, completions: Seq[Completion], generation: Generation) -> Mapping[str, Any]:
        (completion,) = completions
        usage = generation.usage
        parser = None
        content = [_text_block(completion.text)]
        if self._tools is not None:
            parser = self._tools.parser()
            content = _to_blocks(parser.feed(completion.text) + parser.finish()) or [_text_block("")]
        return {
            **self._head,
            "content": content,
            **_to_stop(completion, parser),
            "usage": {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens},
        }


def _event(type_: str, **fields: Any) -> bytes:
    return event(to_json_text({"type": type_, **fields}), type_)


def _text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _call_block(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": name, "input": arguments}


def _to_blocks(events: Seq[Event]) -> list[dict[str, Any]]:
    """What a whole answer consists of, in the order in which a stream has it."""
    blocks: list[dict[str, Any]] = []
    for is_text, group in groupby(events, lambda event: isinstance(event, TextDelta)):
        text, calls = join_events(list(group))
        blocks += (
            [_text_block(text)] if is_text else [_call_block(c.name, _to_input(c.arguments)) for c in calls]
        )
    return blocks


def _to_input(arguments: str) -> Mapping[str, Any]:
    """Arguments of a call; empty where the answer was cut within them."""
    try:
        value = json.loads(arguments)
        check_writable(value)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _to_stop(completion: Completion, parser: ToolParser | None) -> Mapping[str, Any]:
    has_called = parser is not None and parser.has_calls
    reason = (
        "max_tokens" if completion.finish_reason == "length" else "tool_use" if has_called else "end_turn"
    )
    return {
        "stop_reason": reason if completion.stop_string is None else "stop_sequence",
        "stop_sequence": completion.stop_string,
    }
