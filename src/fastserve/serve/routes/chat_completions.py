"""/v1/chat/completions: answers to conversations."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fastserve.engine.completion import Chunk, Completion
from fastserve.engine.loaded_model import LoadedModel
from fastserve.errors import FastServeError
from fastserve.serve.chat_prompt import make_chat_prompt
from fastserve.serve.chat_tools import ChatTools
from fastserve.serve.choice_stream import ChoiceStream
from fastserve.serve.errors import naming
from fastserve.serve.generation import Generation
from fastserve.serve.logprob import LogprobWriter
from fastserve.serve.schema.body import ERRORS, STREAMED
from fastserve.serve.schema.chat import ChatDocument, ChatRequest, NamedTool
from fastserve.serve.security import tenant_of
from fastserve.serve.service import Service
from fastserve.serve.stream import error_event, to_json_text
from fastserve.serve.tools.parser import ArgumentsDelta, CallStart, Event, TextDelta, ToolParser, join_events


def chat_completions_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["generate"], responses=ERRORS)

    @router.post("/v1/chat/completions", response_model=ChatDocument, responses=STREAMED)
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        async with service.generator(body.model, request, timeout_ms=body.timeout_ms) as llm:
            with naming(body.names, prompt="messages", constraint=body.constraint_field or "tools"):
                prompt = await make_chat_prompt(
                    llm.model,
                    [message.to_template() for message in body.messages],
                    tools=_to_tools(body, llm.model),
                    constraint=body.to_constraint(),
                    variables=body.chat_template_kwargs,
                )
                asked = body.to_request(
                    [prompt.token_ids],
                    tenant=tenant_of(request.scope, body.user),
                    max_tokens=body.most_tokens,
                    logprobs=body.num_logprobs,
                    constraint=prompt.constraint,
                    skip_special_tokens=prompt.skip_special_tokens,
                )
                format_ = ChatFormat(
                    body.model,
                    LogprobWriter(llm.model.target_tokenizer),
                    tools=prompt.tools,
                    has_usage=body.has_usage,
                )
                return await service.answer(llm, asked, format_, request, is_streamed=bool(body.stream))

    return router


class ChatFormat:
    """`chat.completion` and its chunks.

    Args:
        tools: that the model may call; None: there are none.
    """

    def __init__(
        self, model: str, logprobs: LogprobWriter, *, tools: ChatTools | None, has_usage: bool
    ) -> None:
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self._logprobs = logprobs
        self._tools = tools
        self._parsers: dict[int, ToolParser] = {}  # by completion
        self._events = ChoiceStream({**self._head, "object": "chat.completion.chunk"}, has_usage=has_usage)

    def begin(self, generation: Generation) -> bytes:
        return "".join(
            self._choice(index, '{"role":"assistant","content":""}', "null", "null")
            for index in range(generation.num_completions)
        ).encode()

    def chunk(self, index: int, chunk: Chunk) -> bytes:
        logprobs = "null"
        if chunk.logprobs is not None:
            logprobs = f'{{"content":[{to_json_text(self._logprobs.chat(chunk.logprobs))}],"refusal":null}}'
        content, calls = chunk.text, ""
        if self._tools is not None:
            events = self._parse(index, chunk)
            content = "".join(event.text for event in events if isinstance(event, TextDelta))
            deltas = (self._call_delta(event) for event in events if not isinstance(event, TextDelta))
            calls = "".join(self._choice(index, to_json_text(delta), "null", "null") for delta in deltas)
        text = ""
        if content or chunk.logprobs is not None:
            text = self._choice(index, f'{{"content":{to_json_text(content)}}}', logprobs, "null")
        text += calls
        if chunk.completion is not None:
            finish_reason = self._finish_reason(chunk.completion, self._parsers.get(index))
            text += self._choice(index, "{}", "null", f'"{finish_reason}"')
        return text.encode()

    def _parse(self, index: int, chunk: Chunk) -> list[Event]:
        assert self._tools is not None
        parser = self._parsers.get(index)
        if parser is None:
            parser = self._parsers[index] = self._tools.parser()
        return parser.feed(chunk.text) + (parser.finish() if chunk.completion is not None else [])

    @staticmethod
    def _call_delta(event: CallStart | ArgumentsDelta) -> Mapping[str, Any]:
        if isinstance(event, CallStart):
            call = _to_call(event.name, "")
            return {"tool_calls": [{"index": event.index, **call}]}
        return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}

    @staticmethod
    def _finish_reason(completion: Completion, parser: ToolParser | None) -> str:
        """Calls are why a completion that is whole has ended."""
        has_called = parser is not None and parser.has_calls
        return "tool_calls" if has_called and completion.finish_reason == "stop" else completion.finish_reason

    def end(self, generation: Generation) -> bytes:
        return self._events.end(generation.usage)

    def error(self, error: FastServeError) -> bytes:
        return error_event(error)

    def document(self, completions: Seq[Completion], generation: Generation) -> Mapping[str, Any]:
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._document(index, completion) for index, completion in enumerate(completions)],
            "usage": generation.usage.to_json(),
        }

    def _choice(self, index: int, delta: str, logprobs: str, finish_reason: str) -> str:
        return self._events.choice(
            f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish_reason}}}'
        )

    def _document(self, index: int, completion: Completion) -> Mapping[str, Any]:
        logprobs = None
        if completion.logprobs is not None:
            logprobs = {"content": [self._logprobs.chat(lp) for lp in completion.logprobs], "refusal": None}
        message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None}
        parser = None
        if self._tools is not None:
            parser = self._tools.parser()
            text, calls = join_events(parser.feed(completion.text) + parser.finish())
            message["content"] = text
            if calls:
                message["content"] = text or None
                message["tool_calls"] = [_to_call(call.name, call.arguments) for call in calls]
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self._finish_reason(completion, parser),
        }


def _to_tools(body: ChatRequest, model: LoadedModel) -> ChatTools | None:
    tools = None if body.tools is None else [tool.model_dump(exclude_none=True) for tool in body.tools]
    choice = body.tool_choice
    return ChatTools.of(
        model,
        tools,
        choice.model_dump() if isinstance(choice, NamedTool) else choice,
        body.parallel_tool_calls,
        has_calls=any(message.tool_calls for message in body.messages),
    )


def _to_call(name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
