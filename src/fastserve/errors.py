"""Every error a user can meet. Each says what was wrong, the value, the limit, and (as `hint`) what to do.

FastServeError
├── OptionError            an option or parameter is unknown or out of range
│   ├── ClosedError        a model is asked for something after it was closed
│   └── ConstraintError    a schema, pattern or grammar cannot be compiled, or is too large
├── ModelNotFoundError     no model of that name, folder or source
├── DownloadError          a source could not be fetched or did not match its checksum
├── OfflineError           a network access was needed while offline
├── CheckpointError        a file is corrupt, truncated or inconsistent
├── UnsupportedError       an architecture, tensor type or tokenizer that we do not have
├── MemoryLimitError       more memory is needed than there is
│   └── ModelMemoryError   a model does not fit beside those that a server keeps
├── ContextLengthError     a prompt (with its completion) does not fit the model's context
├── TemplateError          a chat template is missing or failed on these messages
├── StepError              a request could not go on: its step failed, or the model is broken
├── DeadlineError          a request cannot be complete in its time, or was not, or waited too long for a turn
├── QueueFullError         as many requests wait as may; it says when to try again
├── RateLimitError         a tenant has reached one of its limits; it says when to try again
├── RequestError           an HTTP request that the server does not take
├── TraceError             a trace of requests is missing, broken or of no known format
├── DataError              a file of labelled data or text is missing, malformed or contradicts itself
└── MeasurementError       a measurement contradicts itself, or what was to be measured failed
"""

from __future__ import annotations

import math


class FastServeError(Exception):
    """Base of the tree. `hint` is the remedy, shown after the message."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    @property
    def message(self) -> str:
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.message} (hint: {self.hint})" if self.hint else self.message


class OptionError(FastServeError, ValueError):
    """An option or parameter is unknown or out of range.

    Attributes:
        option: its name, where the message is about a single one.
    """

    def __init__(self, message: str, *, hint: str | None = None, option: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.option = option


class ClosedError(OptionError):
    """A model was closed, and is asked for something, or has yet to answer."""


class ConstraintError(OptionError):
    """A schema, pattern or grammar that a completion is to follow cannot be compiled, or is too large."""


class ModelNotFoundError(FastServeError):
    """No model of that name, folder or source."""


class DownloadError(FastServeError):
    """A source could not be fetched, or what came did not match its checksum."""


class OfflineError(DownloadError):
    """A network access was needed while `--offline` or FASTSERVE_OFFLINE forbade it."""


class CheckpointError(FastServeError):
    """A model file is corrupt, truncated or inconsistent."""


class UnsupportedError(FastServeError):
    """An architecture, tensor type or tokenizer that this version does not have."""


class MemoryLimitError(FastServeError):
    """More memory is needed than there is."""


class ModelMemoryError(MemoryLimitError):
    """A model does not fit the memory that a server may have for models, or that the machine has left."""


class ContextLengthError(FastServeError, ValueError):
    """A prompt, with the completion asked for, does not fit the model's context."""


class TemplateError(FastServeError):
    """A chat template is missing, or failed on these messages."""


class StepError(FastServeError):
    """A request could not go on: a step that it took part in failed, or the model computed no numbers."""


class DeadlineError(FastServeError):
    """A request cannot be complete in the time that it was given, or was not; or it had no turn in time."""


class QueueFullError(FastServeError):
    """As many requests wait for their first turn as may.

    Attributes:
        retry_after_seconds: when a place is likely to be free, by how fast requests have started of late.
    """

    def __init__(self, message: str, *, retry_after_seconds: float, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_seconds = retry_after_seconds


class RateLimitError(FastServeError):
    """A tenant has reached one of its limits.

    Attributes:
        limit: its name, such as requests_per_minute.
        retry_after_seconds: when a request like this one is within it again, unless others come before.
    """

    def __init__(self, message: str, *, limit: str, retry_after_seconds: float) -> None:
        seconds = max(1, math.ceil(retry_after_seconds))
        super().__init__(message, hint=f"try again in {seconds} second{'s' * (seconds > 1)}")
        self.limit = limit
        self.retry_after_seconds = retry_after_seconds


class RequestError(FastServeError):
    """An HTTP request that the server does not take: its address, key, size, or a field of its body.

    Attributes:
        status: of the answer, 4xx; 503 where the server ends.
        code: what is wrong, in a word.
        param: the field that is wrong, where it is one.
    """

    def __init__(
        self, message: str, *, status: int, code: str, param: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.code = code
        self.param = param


class TraceError(FastServeError):
    """A trace of requests is missing, broken or of no known format."""


class DataError(FastServeError):
    """A file of labelled data or text is missing, malformed or contradicts itself; its line is named."""


class MeasurementError(FastServeError):
    """A measurement contradicts itself, or what was to be measured failed."""
