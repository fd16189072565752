"""/admin/models."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fastserve.serve.schema.body import Body, Document


class ModelName(Body):
    model: str = Field(description="A name, an alias, or a version.")


class ModelStatus(Document):
    name: str
    aliases: list[str]
    version: str | None
    state: Literal["unloaded", "loading", "loaded", "unloading"]
    is_pinned: bool
    memory_bytes: int = Field(description="That it takes when it is loaded; 0 as long as nobody knows.")
    num_requests: int = Field(description="That use it.")
    num_waiting: int = Field(description="Requests that wait for it to be loaded.")
    num_loads: int
    idle_seconds: float | None = Field(
        description="How long ago its last request has ended; null while it is used, or not loaded."
    )
    task: Literal["generate", "embed"] | None
    error: str | None = Field(description="Why its last load has failed, if it has.")


class MemoryStatus(Document):
    budget_bytes: int | None
    used_bytes: int


class ModelStatusList(Document):
    models: list[ModelStatus]
    model_memory: MemoryStatus
