"""Who is let in: by API keys, or, on loopback without keys, by the Host and Origin that browsers send.

A page of any web site can have its visitor's browser send requests to this machine; its name for the machine
(Host) or its own (Origin) gives it away, also where its name is made to point here (DNS rebinding).
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Collection, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from fastserve.errors import OptionError, RequestError
from fastserve.serve.errors import error_response
from fastserve.serve.options import ServeOptions, is_loopback

KEY_VARIABLE = "FASTSERVE_API_KEY"
OPEN_PATHS = frozenset({"/health/live", "/health/ready", "/"})  # for those who look after the process
_OPEN_PREFIX = "/dashboard/"  # files of the page at /: they know nothing
_LINE = re.compile(r"([^\s/]+)\s+([0-9a-f]{64})")  # with a slash begin users of a key: see tenant_of


class ApiKeys:
    """Keys by their SHA-256 digests, which tell nobody the keys: those are long and random.

    >>> ApiKeys({"alice": digest_of("secret")}).name_of("secret")
    'alice'
    """

    def __init__(self, digests: Mapping[str, str]) -> None:
        self._names = {digest: name for name, digest in digests.items()}

    def __len__(self) -> int:
        return len(self._names)

    @classmethod
    def load(cls, options: ServeOptions) -> ApiKeys:
        """The keys of the options' file, or that of the environment; they may be none.

        Raises:
            OptionError: the file has a line that is none of ours, or no key.
        """
        if options.api_keys is not None:
            return cls(read_key_file(Path(options.api_keys)))
        key = os.environ.get(KEY_VARIABLE)
        return cls({"default": digest_of(key)} if key else {})

    def name_of(self, key: str) -> str | None:
        """Whose key it is; None: nobody's."""
        return self._names.get(digest_of(key))


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_key_file(path: Path) -> dict[str, str]:
    """Digests by name: a line each, `NAME DIGEST`; empty ones and those that begin with # say nothing.

    Raises:
        OptionError: it is no text, a line is of another form, a name comes twice, or there is no key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{path} is no key file: it is not UTF-8",
            hint=f"write keys with `fastserve keys {path} NAME`",
            option="api_keys",
        ) from error
    digests: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None or match[1] in digests:
            raise OptionError(
                f"{path}, line {number}: is no name with the digest of a key, or the name's second",
                hint=f"write keys with `fastserve keys {path} NAME`",
                option="api_keys",
            )
        digests[match[1]] = match[2]
    if not digests:
        raise OptionError(
            f"{path} has no keys", hint=f"write one with `fastserve keys {path} NAME`", option="api_keys"
        )
    return digests


def add_key(path: Path, name: str) -> str:
    """Add a new key to a file, which is made for its owner alone where it is missing, and return the key.

    Raises:
        OptionError: the name is taken, or has spaces or slashes; the file is none of keys.
    """
    if not re.fullmatch(r"[^\s#/][^\s/]*", name):
        raise OptionError(
            f"name={name!r} is not a word", hint="choose a name without spaces and slashes, such as alice"
        )
    is_line_open = False
    if path.exists() and path.stat().st_size:
        if name in read_key_file(path):
            raise OptionError(f"{path} has a key of {name!r}", hint="choose another name, or delete its line")
        is_line_open = not path.read_bytes().endswith(b"\n")
    key = f"fs-{secrets.token_urlsafe(32)}"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "a", encoding="utf-8") as file:
        file.write("\n" * is_line_open + f"{name} {digest_of(key)}\n")
    return key


def check_exposure(options: ServeOptions, keys: ApiKeys) -> None:
    """
    Raises:
        OptionError: others reach the server, and nobody needs a key.
    """
    if not keys and not options.is_on_loopback:
        raise OptionError(
            f"host={options.host!r} lets other machines in, and there are no API keys",
            hint="make a key with `fastserve keys FILE NAME` and start with --api-keys FILE, or set "
            f"{KEY_VARIABLE}",
            option="host",
        )


class Security:
    """Around the routes: refuses who has no key, or, on loopback, whom a web site has sent."""

    def __init__(self, app: ASGIApp, *, options: ServeOptions, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys
        self._hosts: Collection[str] | None = None  # beside loopback; None: any
        if options.is_on_loopback:
            self._hosts = frozenset(host.lower() for host in options.allowed_hosts)
        self._origins = frozenset(options.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except RequestError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if self._hosts is not None:
            self._check_host(headers.get(b"host", ""))
            self._check_origin(headers.get(b"origin"))
        if self._keys and not _is_open(scope["path"]):
            scope["fastserve.key_name"] = self._check_key(headers)

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

    def _check_key(self, headers: Mapping[bytes, str]) -> str:
        kind, _, key = headers.get(b"authorization", "").partition(" ")
        if kind.lower() != "bearer":
            key = headers.get(b"x-api-key", "")
        if not key.strip():
            raise RequestError(
                "the request has no API key",
                status=401,
                code="missing_api_key",
                hint="send it as `Authorization: Bearer KEY`",
            )
        name = self._keys.name_of(key.strip())
        if name is None:
            raise RequestError("the API key is not known here", status=401, code="invalid_api_key")
        return name


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(_OPEN_PREFIX)


def _host_of(origin: str) -> str:
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:
        return ""


def tenant_of(scope: Scope, user: str | None) -> str:
    """Whose request it is: the user that it names; with keys, a user of the key's, or the key itself."""
    key_name = scope.get("fastserve.key_name")
    if key_name is None:
        return user or ""
    return f"{key_name}/{user}" if user else str(key_name)
