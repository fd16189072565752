"""/openapi.json: the API as OpenAPI describes it; what is below /admin for who has the admin key alone."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import cache

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from fastserve.serve.security import OPENAPI_PATH, is_admin
from fastserve.serve.stream import to_json_text


def add_openapi(app: FastAPI, public: Seq[BaseRoute]) -> None:
    """Have an application describe the routes that it has by now: to who has the admin key all of them, to
    others those that are public.
    """
    routes = list(app.routes)

    @cache
    def document(has_admin: bool) -> bytes:
        shown = routes if has_admin else public
        return to_json_text(get_openapi(title=app.title, version=app.version, routes=shown)).encode()

    @app.get(OPENAPI_PATH, include_in_schema=False)
    async def get_document(request: Request) -> Response:
        return Response(document(is_admin(request.scope)), media_type="application/json")
