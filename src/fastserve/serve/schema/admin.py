"""/admin: what may be asked of a server by who looks after it. Snapshots and policies describe themselves
(`fastserve.serve.snapshot`, `fastserve.engine.policy`)."""

from __future__ import annotations

from pydantic import Field

from fastserve.serve.schema.body import Body, Document, Name


class PolicyRequest(Body):
    policy: str = Field(max_length=1000)  # NAME, or NAME:KNOB=VALUE,...
    model: Name | None = None  # None: all that generate text


class PolicyDocument(Document):
    policy: str
    models: list[str]


class DrainRequest(Body):
    is_draining: bool = True


class DrainDocument(Document):
    is_draining: bool
    num_requests: int  # under way: those whose answers have not gone out whole
