"""/admin/tenants and /admin/usage: what tenants may, and what they have had."""

from __future__ import annotations

import time

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

from fastserve.errors import OptionError, RequestError
from fastserve.serve.schema.body import ERRORS
from fastserve.serve.schema.tenants import ReloadDocument, TenantList, UsageDocument
from fastserve.serve.service import Service
from fastserve.serve.stream import json_response
from fastserve.serve.usage import describe_usage, write_csv


def tenants_router(service: Service) -> APIRouter:
    router = APIRouter(prefix="/admin", tags=["admin"], responses=ERRORS)
    tenants, energy = service.tenants, service.energy
    since = time.time()

    @router.get("/tenants", response_model=TenantList)
    async def list_tenants() -> Response:
        """Their terms, what is left of them now, and their keys by name."""
        return json_response({"tenants": tenants.describe()})

    @router.post("/tenants/reload", response_model=ReloadDocument)
    async def reload_tenants() -> Response:
        """Read the files of keys again. A mistake is told by its line, and all stays as it is."""
        if not tenants.keys.has_key_file:
            raise RequestError(
                "there is no file of API keys to be read again",
                status=400,
                code="no_key_file",
                hint="start the server with --tenants FILE",
            )
        try:
            await tenants.reload(service.models.generators)
        except OptionError as error:
            raise RequestError(error.message, status=400, code="invalid_key_file", hint=error.hint) from error
        return json_response({"num_keys": len(tenants.keys), "num_tenants": len(tenants.keys.table.terms)})

    @router.get("/usage", response_model=UsageDocument)
    async def get_usage() -> Response:
        """Of all tenants, since the server's start."""
        return json_response(
            {
                "since": since,
                "time": time.time(),
                "energy": energy.describe(),
                "tenants": [describe_usage(tenant, has_energy=energy.is_known) for tenant in tenants],
            }
        )

    @router.get("/usage.csv", response_class=PlainTextResponse)
    async def get_usage_csv() -> Response:
        """The same as a table."""
        text = write_csv(tenants, has_energy=energy.is_known)
        headers = {"content-disposition": "attachment; filename=usage.csv"}
        return PlainTextResponse(text, headers=headers, media_type="text/csv")

    return router
