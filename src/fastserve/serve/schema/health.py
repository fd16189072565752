"""/health/live and /health/ready."""

from __future__ import annotations

from typing import Literal

from fastserve.serve.schema.body import Document


class HealthDocument(Document):
    status: Literal["ok", "fail"]
    reasons: dict[str, str]  # by model, or of the server
