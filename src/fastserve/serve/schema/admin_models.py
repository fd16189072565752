"""/admin/models."""

from __future__ import annotations

from pydantic import Field

from fastserve.serve.schema.body import Body


class ModelName(Body):
    model: str = Field(description="A name, an alias, or a version.")
