"""Who is let in: by API keys, or, on loopback without keys, by the Host and Origin that browsers send; and to
/admin by the admin key alone.

A page of any web site can have its visitor's browser send requests to this machine; its name for the machine
(Host) or its own (Origin) gives it away, also where its name is made to point here (DNS rebinding).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from fastserve.errors import FastServeError, OptionError, RequestError
from fastserve.serve.api_keys import KEY_VARIABLE, ApiKeys
from fastserve.serve.errors import error_response, nothing_at
from fastserve.serve.options import ServeOptions, is_loopback
from fastserve.serve.record import RequestRecord
from fastserve.serve.tenant_table import Tenant, TenantTable

OPEN_PATHS = frozenset({"/health/live", "/health/ready", "/"})  # for those who look after the process
_OPEN_PREFIX = "/dashboard/"  # files of the page at /: they know nothing
OPENAPI_PATH = "/openapi.json"
_SHOWS_ADMIN_MORE = frozenset({OPENAPI_PATH, "/metrics"})
WORK_PATHS = frozenset(  # what the limits of running requests and of tokens are for
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/embeddings",
        "/v1/score",
        "/v1/rerank",
        "/v1/classify",
        "/v1/token-classify",
        "/v1/relations",
        "/v1/answer",
    }
)
_TENANT = "fastserve.tenant"
_IS_ADMIN = "fastserve.is_admin"


def check_exposure(options: ServeOptions, keys: ApiKeys) -> None:
    """
    Raises:
        OptionError: others reach the server, and nobody needs a key.
    """
    if not keys and not options.is_on_loopback:
        raise OptionError(
            f"host={options.host!r} lets other machines in, and there are no API keys",
            hint="make a key with `fastserve keys FILE NAME` and start with --tenants FILE, or set "
            f"{KEY_VARIABLE}",
            option="host",
        )


class Security:
    """Around the routes: refuses who has no key, whose tenant is over a limit, or, on loopback, whom a web
    site has sent. Who has the admin key is known by it below /admin (see `AdminGate`), and where it shows
    more."""

    def __init__(self, app: ASGIApp, *, options: ServeOptions, tenants: TenantTable) -> None:
        self._app = app
        self._keys = tenants.keys
        self._tenants = tenants
        self._hosts: Collection[str] | None = None  # beside loopback; None: any
        if options.is_on_loopback:
            self._hosts = frozenset(host.lower() for host in options.allowed_hosts)
        self._origins = frozenset(options.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except FastServeError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if self._hosts is not None:
            self._check_host(headers.get(b"host", ""))
            self._check_origin(headers.get(b"origin"))
        path, key = scope["path"], _key_of(headers)
        scope[_TENANT] = self._tenants.anonymous
        counts = is_below_admin(path) or path in _SHOWS_ADMIN_MORE
        scope[_IS_ADMIN] = counts and self._keys.is_admin(key)
        if scope[_IS_ADMIN]:
            RequestRecord.of(scope).details["is_admin"] = True
        elif self._keys and not _is_open(path):
            tenant = scope[_TENANT] = self._check_key(key, scope)
            if not _gives_up_work(scope):
                tenant.enter(is_work=scope["method"] == "POST" and path in WORK_PATHS)

    def _check_host(self, host: str) -> None:
        assert self._hosts is not None
        name = _host_of(f"//{host}")
        if not is_loopback(name) and name not in self._hosts:
            raise RequestError(
                f"the request calls this server {host[:100]!r}; it answers to localhost",
                status=403,
                code="host_not_allowed",
                hint="start it with --allowed-hosts NAME",
            )

    def _check_origin(self, origin: str | None) -> None:
        if origin is None or origin in self._origins:
            return
        name = _host_of(origin)
        if not is_loopback(name) and name not in (self._hosts or ()):
            raise RequestError(
                f"pages of {origin[:100]!r} may not send requests to this server",
                status=403,
                code="origin_not_allowed",
                hint="start it with --cors-origins ORIGIN",
            )

    def _check_key(self, key: str, scope: Scope) -> Tenant:
        if not key:
            raise RequestError(
                "the request has no API key",
                status=401,
                code="missing_api_key",
                hint="send it as `Authorization: Bearer KEY`",
            )
        known = self._keys.find(key)
        if known is None:
            raise RequestError("the API key is not known here", status=401, code="invalid_api_key")
        RequestRecord.of(scope).details |= {"key": known.name, "tenant": known.tenant}
        if known.has_expired:
            raise RequestError(
                f"the API key {known.name!r} has expired: {known.expires} was its last day",
                status=401,
                code="expired_api_key",
                hint="ask for another one",
            )
        return self._tenants.find(known.tenant)


class AdminGate:
    """Inside of all that looks at requests, around the routes: without the admin key there is nothing below
    /admin, and what there would be makes no difference."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and is_below_admin(scope["path"]) and not is_admin(scope):
            await error_response(nothing_at(scope["path"]))(scope, receive, send)
            return
        await self._app(scope, receive, send)


def is_below_admin(path: str) -> bool:
    """
    >>> [is_below_admin(path) for path in ("/admin", "/admin/status", "/administer")]
    [True, True, False]
    """
    return path == "/admin" or path.startswith("/admin/")


def _key_of(headers: Mapping[bytes, str]) -> str:
    kind, _, key = headers.get(b"authorization", "").partition(" ")
    return (key if kind.lower() == "bearer" else headers.get(b"x-api-key", "")).strip()


def _gives_up_work(scope: Scope) -> bool:
    """Whether the request can only have the server do less: no limit is in its way."""
    return bool(scope["method"] == "DELETE" or scope["path"].endswith("/cancel"))


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(_OPEN_PREFIX)


def _host_of(origin: str) -> str:
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:
        return ""


def account_of(scope: Scope) -> Tenant:
    """Whose request it is, for limits and usage."""
    tenant = scope[_TENANT]
    assert isinstance(tenant, Tenant)
    return tenant


def tenant_of(scope: Scope, user: str | None) -> str:
    """Whose request it is, for the engine: with keys, the key's tenant; without, the user that it names.

    With keys the user is for the log alone: whoever makes up users has no more of the model for it.
    """
    tenant = account_of(scope)
    if tenant.is_anonymous:
        return user or ""
    if user:
        RequestRecord.of(scope).details["user"] = user
    return tenant.name


def is_admin(scope: Scope) -> bool:
    """Whether it was sent with the admin key, to where that counts."""
    return bool(scope[_IS_ADMIN])
