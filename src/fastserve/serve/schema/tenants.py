"""/admin/tenants and /admin/usage."""

from __future__ import annotations

from fastserve.serve.schema.body import Document


class KeyDocument(Document):
    name: str
    expires: str | None  # the last day that it is good for, UTC
    has_expired: bool


class TenantDocument(Document):
    name: str
    weight: float
    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_concurrent: int | None
    num_running: int
    requests_left: int | None
    tokens_left: int | None
    keys: list[KeyDocument]


class TenantList(Document):
    tenants: list[TenantDocument]


class ReloadDocument(Document):
    num_keys: int
    num_tenants: int


class TenantUsageDocument(Document):
    name: str
    weight: float
    num_running: int
    requests: int
    prompt_tokens: int
    completion_tokens: int
    service_seconds: float
    joules: float | None
    refused: int


class EnergyDocument(Document):
    watts: float | None
    joules: float | None


class UsageDocument(Document):
    since: float  # Unix seconds
    time: float
    energy: EnergyDocument
    tenants: list[TenantUsageDocument]
