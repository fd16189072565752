"""/admin/adapters."""

from __future__ import annotations

from pydantic import Field

from fastserve.serve.schema.body import Body


class AdapterName(Body):
    model: str = Field(description="The name of a model, an alias, or a version.")
    name: str = Field(description="What the adapter is called: requests choose it as MODEL:NAME.")


class AdapterFolder(AdapterName):
    path: str = Field(description="Its folder on the server's machine.")
