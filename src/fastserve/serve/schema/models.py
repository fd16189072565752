"""/v1/models."""

from __future__ import annotations

from typing import Literal

from fastserve.models.task import Task
from fastserve.serve.schema.body import Document


class ModelDocument(Document):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None  # of an adapter: the model that it is beside
    task: Task
    context_length: int


class ModelList(Document):
    object: Literal["list"]
    data: list[ModelDocument]
