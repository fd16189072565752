"""One request to a server and what came back of it, with the times of everything, by the client's clock."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from fastserve.evaluate.arrival import Arrival


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """What is to be sent, and when: a prompt of about `arrival.prompt_tokens` tokens."""

    arrival: Arrival
    prompt: str


@dataclass(slots=True, kw_only=True)
class Exchange:
    """A request and its answer so far. Times are seconds of `time.perf_counter`.

    Attributes:
        arrival_seconds: when it was to be sent; of a closed loop, when it was sent.
        text_seconds: when each piece of text came, which is a token where the server writes each by itself.
        prompt_tokens, completion_tokens: as the server counts them; of one that does not tell, the
            completion's are the pieces of text, and the prompt's unknown.
        failure: why there is no whole answer, by kind: `connection refused`, `http 429 queue_full`, ...
    """

    planned: PlannedRequest
    arrival_seconds: float
    sent_seconds: float | None = None
    text_seconds: list[float] = field(default_factory=list)
    end_seconds: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    failure: str | None = None
    message: str | None = None  # the server's, where the request failed

    @property
    def first_token_seconds(self) -> float | None:
        """When the first text came; of a completion without any, its end."""
        return self.text_seconds[0] if self.text_seconds else self.end_seconds

    @property
    def last_news_seconds(self) -> float:
        """When it last went on."""
        return self.text_seconds[-1] if self.text_seconds else self.sent_seconds or self.arrival_seconds

    @property
    def has_ended(self) -> bool:
        return self.end_seconds is not None or self.failure is not None

    @property
    def gaps(self) -> Seq[float]:
        """Seconds between pieces of text that follow each other."""
        return [
            after - before for before, after in zip(self.text_seconds, self.text_seconds[1:], strict=False)
        ]

    def fail(self, kind: str, message: str | None = None) -> None:
        """Note why there will be no answer; the first reason counts."""
        if self.failure is None:
            self.failure, self.message, self.end_seconds = kind, message, None

    def take(self, document: Any, now: float) -> None:
        """Take over what an event of a stream says.

        Raises:
            ValueError: it is no event of the API.
        """
        if not isinstance(document, dict):
            raise ValueError(f"an event is {str(document)[:40]!r}, not an object")
        if document.get("error"):
            self.fail(f"error in stream {error_code(document)}".rstrip(), error_message(document))
            return
        for choice in document.get("choices") or ():
            delta = choice.get("delta") or {}
            if choice.get("text") or delta.get("content") or delta.get("reasoning_content"):
                self.text_seconds.append(now)
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        if usage := document.get("usage"):
            self.prompt_tokens = usage.get("prompt_tokens")
            self.completion_tokens = usage.get("completion_tokens")

    def finish(self, now: float) -> None:
        """Note that all of the answer has come."""
        if self.failure is None:
            if self.finish_reason is None:
                self.fail("cut short", "the stream ended without a finish reason")
                return
            self.end_seconds = self.text_seconds[-1] if self.text_seconds else now
            if self.completion_tokens is None:
                self.completion_tokens = len(self.text_seconds)


def error_code(document: Any) -> str:
    """What an error object is called: its code, or else its type; empty where there is no such object.

    >>> error_code({"error": {"message": "no", "type": "rate_limit_error", "code": "queue_full"}})
    'queue_full'
    """
    error = document.get("error") if isinstance(document, dict) else None
    if not isinstance(error, dict):
        return ""
    return str(error.get("code") or error.get("type") or "")


def error_message(document: Any) -> str:
    """What an error says, whichever form it has."""
    error = document.get("error", document) if isinstance(document, dict) else document
    if isinstance(error, dict):
        error = error.get("message", error)
    return str(error)[:400]
