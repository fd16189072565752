"""What a server looks like at a moment: the document of /admin/status, and of each event of /admin/events."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

from fastserve.engine.snapshot import EngineSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSnapshot:
    """A model that the server knows."""

    name: str
    aliases: Seq[str] = ()
    version: str | None = None
    state: Literal["unloaded", "loading", "loaded", "unloading"]
    is_pinned: bool
    memory_bytes: int  # that it takes, or would take
    num_requests: int  # that are not finished
    idle_seconds: float | None  # since its last request ended; None: it is in use, or was never
    task: Literal["generate", "embed"] | None  # None: not known before it was loaded
    error: str | None = None  # why it could not be loaded


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """What models may take together, and take."""

    budget_bytes: int | None  # None: there is no limit
    used_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantSnapshot:
    """What a tenant has used since the server's start."""

    name: str
    weight: float
    num_running: int  # requests
    requests: int  # that were taken in
    prompt_tokens: int
    completion_tokens: int
    service_seconds: float  # its share of the steps
    joules: float | None  # None: the machine does not report energy
    refused: int  # requests


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class Energy:
    watts: float | None  # of the processors, of late; None: the machine does not report them


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSnapshot:
    """Of one server."""

    time: float  # Unix, seconds
    uptime_seconds: float
    version: str
    is_draining: bool
    memory: ProcessMemory
    energy: Energy
    models: Seq[ModelSnapshot]
    model_memory: ModelMemory
    engines: Seq[EngineSnapshot]
    tenants: Seq[TenantSnapshot]
