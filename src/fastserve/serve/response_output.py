"""The output of a response: items one after the other, messages and calls, and the events by which they
grow."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from fastserve.serve.chat_tools import ChatTools
from fastserve.serve.schema.chat import FunctionCall, ToolCall, to_template_call
from fastserve.serve.tools.parser import CallStart, TextDelta

Event = tuple[str, Mapping[str, Any]]  # its type, and its fields


class ResponseOutput:
    """Of one answer. An item is complete when the next begins.

    Args:
        tools: that the model may call; None: there are none, and the only item is a message.
    """

    def __init__(self, tools: ChatTools | None) -> None:
        self.items: list[dict[str, Any]] = []
        self._parser = None if tools is None else tools.parser()
        self._logprobs: list[Any] = []  # of tokens whose text has not come

    def begin(self) -> list[Event]:
        """Before the first token."""
        return self._begin_message() if self._parser is None else []

    def take(self, text: str, logprobs: Seq[Any], *, is_last: bool) -> list[Event]:
        """More of the answer. Log-probabilities of calls are left out: their items have no place for them."""
        self._logprobs += logprobs
        if self._parser is None:
            return self._add_text(text) if text or logprobs else []
        events: list[Event] = []
        for event in self._parser.feed(text) + (self._parser.finish() if is_last else []):
            if isinstance(event, TextDelta):
                events += self._add_text(event.text)
            elif isinstance(event, CallStart):
                events += self._begin_call(event.name)
            else:
                events += self._add_arguments(event.text)
        return events

    def finish(self, status: str) -> list[Event]:
        """After the last token."""
        begun = [] if self.items else self._begin_message()
        return begun + self._end_item(status)

    def to_template(self) -> dict[str, Any]:
        """The answer as chat templates read it."""
        texts = [item["content"][0]["text"] for item in self.items if item["type"] == "message"]
        message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
        calls = [item for item in self.items if item["type"] == "function_call"]
        if calls:
            message["tool_calls"] = [
                to_template_call(
                    ToolCall(
                        id=call["call_id"],
                        type="function",
                        function=FunctionCall(name=call["name"], arguments=call["arguments"]),
                    )
                )
                for call in calls
            ]
        return message

    def _begin_message(self) -> list[Event]:
        before = self._end_item("completed")
        item = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self.items.append({**item, "content": [part]})
        return [
            *before,
            ("response.output_item.added", {"output_index": len(self.items) - 1, "item": item}),
            ("response.content_part.added", {**self._part_place(), "part": {**part, "logprobs": []}}),
        ]

    def _add_text(self, text: str) -> list[Event]:
        begun = []
        if not self.items or self.items[-1]["type"] != "message":
            begun = self._begin_message()
        logprobs, self._logprobs = self._logprobs, []
        part = self.items[-1]["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        delta = {"delta": text, "logprobs": logprobs}
        return [*begun, ("response.output_text.delta", {**self._part_place(), **delta})]

    def _begin_call(self, name: str) -> list[Event]:
        before = self._end_item("completed")
        self._logprobs = []
        item = {
            "id": f"fc_{secrets.token_hex(12)}",
            "type": "function_call",
            "call_id": f"call_{secrets.token_hex(12)}",
            "name": name,
            "arguments": "",
            "status": "in_progress",
        }
        self.items.append(item)
        added = {"output_index": len(self.items) - 1, "item": {**item}}
        return [*before, ("response.output_item.added", added)]

    def _add_arguments(self, text: str) -> list[Event]:
        self.items[-1]["arguments"] += text
        self._logprobs = []
        return [("response.function_call_arguments.delta", {**self._item_place(), "delta": text})]

    def _end_item(self, status: str) -> list[Event]:
        if not self.items:
            return []
        item = self.items[-1]
        item["status"] = status
        done = ("response.output_item.done", {"output_index": len(self.items) - 1, "item": item})
        if item["type"] == "function_call":
            arguments = {**self._item_place(), "name": item["name"], "arguments": item["arguments"]}
            return [("response.function_call_arguments.done", arguments), done]
        part = item["content"][0]
        text = {"text": part["text"], "logprobs": part["logprobs"]}
        return [
            ("response.output_text.done", {**self._part_place(), **text}),
            ("response.content_part.done", {**self._part_place(), "part": part}),
            done,
        ]

    def _item_place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _part_place(self) -> dict[str, Any]:
        return {**self._item_place(), "content_index": 0}
