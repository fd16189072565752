"""/ and /dashboard/: the page that shows the server at work, and its files.

They are read once, when the application is made. The page has no secrets: what it shows it asks for with the
keys that its visitor types. Its policy lets it load from this server, and send to this server, alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from fastserve.serve.service import Service

PAGE_PATH = "/"
FILE_PATH = "/dashboard/"
_PAGE = "index.html"
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "svg": "image/svg+xml",
}
_HEADERS = {
    "cache-control": "no-cache",  # ask each time whether it has changed: a new version is seen at once
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Traversable) -> _File:
        content = path.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        return cls(content, _TYPES[path.name.rpartition(".")[2]], etag)

    def answer(self, request: Request) -> Response:
        headers = {**_HEADERS, "etag": self.etag}
        known = request.headers.get("if-none-match", "").split(",")
        if any(etag.strip().removeprefix("W/") == self.etag for etag in known):
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


def dashboard_router(service: Service) -> APIRouter:
    router = APIRouter(include_in_schema=False)  # pages for people
    found = {path: _File.read(file) for path, file in _walk(files("fastserve.serve") / "dashboard")}
    page = found.pop(_PAGE)

    @router.api_route(PAGE_PATH, methods=["GET", "HEAD"])
    async def get_page(request: Request) -> Response:
        return page.answer(request)

    @router.api_route(FILE_PATH + "{path:path}", methods=["GET", "HEAD"])
    async def get_file(path: str, request: Request) -> Response:
        if path not in found:
            raise HTTPException(404)
        return found[path].answer(request)

    return router


def _walk(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, Traversable]]:
    """All files of a folder, by their paths within it."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        else:
            yield prefix + entry.name, entry
