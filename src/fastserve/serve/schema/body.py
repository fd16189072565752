"""What all request bodies have in common, and the error object."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(max_length=512)]  # of a tenant or a session; it is kept, and logged


class Body(BaseModel):
    """A field that we do not know is refused, and numbers are not read from texts."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Document(BaseModel):
    """An answer."""

    model_config = ConfigDict(protected_namespaces=())


class ErrorObject(Document):
    message: str
    type: str
    param: str | None
    code: str


class ErrorDocument(Document):
    error: ErrorObject


# Of every route. Named so, FastAPI adds no error schema of its own.
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorDocument, "description": "The request is refused."},
    "5XX": {"model": ErrorDocument, "description": "The server has failed, or the request's time is over."},
}

# Of routes that answer in events where they are asked to.
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"itemSchema": {"type": "object", "required": ["data"]}}}}
}


class Usage(Document):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
