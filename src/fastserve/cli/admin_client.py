"""Asks a server what only its admin may know. No proxy and no redirection gets to see the admin key."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastserve._version import __version__
from fastserve.errors import OptionError, RequestError

KEY_VARIABLE = "FASTSERVE_ADMIN_KEY"
_MOST_SECONDS = 10.0
_MOST_BYTES = 64 * 2**20  # of an answer
_DIGEST = re.compile(r"admin\s+[0-9a-f]{64}")


class AdminClient:
    """Of one server.

    >>> AdminClient("http://127.0.0.1:8000", key=None).get("/admin/status")  # doctest: +SKIP

    Args:
        url: without /v1.

    Raises:
        OptionError: the URL is none, or a certificate file that the environment names cannot be read.
    """

    def __init__(self, url: str, *, key: str | None) -> None:
        try:
            parts = urlsplit(url)
            self._host, self._port = parts.hostname, parts.port
        except ValueError as error:
            raise _no_url(url) from error
        if parts.scheme not in ("http", "https") or not self._host or parts.query or parts.fragment:
            raise _no_url(url)
        self.url = url.rstrip("/")
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._headers = {"user-agent": f"fastserve/{__version__}", "accept": "application/json"}
        if key is not None:
            if not re.fullmatch(r"[!-~]+", key):
                raise OptionError(
                    "the admin key is not one word of ASCII",
                    hint=f"put what `fastserve keys FILE --admin` printed into {KEY_VARIABLE}",
                )
            self._headers["authorization"] = f"Bearer {key}"

    def get(self, path: str) -> dict[str, Any]:
        """The document at a path.

        Raises:
            OptionError: nobody answers there, or somebody who is no server of ours.
            RequestError: what the server refuses.
        """
        try:
            status, body = self._exchange(self._prefix + path)
        except (OSError, HTTPException, ValueError) as error:  # ValueError: a path or a host that is none
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            if isinstance(error, TimeoutError):
                reason = f"nothing came within {_MOST_SECONDS:g} seconds"
            raise OptionError(
                f"{self.url} does not answer: {reason}",
                hint="see that `fastserve serve` runs there; it says its URL when it starts",
                option="url",
            ) from error
        try:
            document = json.loads(body)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise OptionError(
                f"{self.url} answers {path} with status {status} and no JSON",
                hint="name the URL of a `fastserve serve`",
                option="url",
            )
        if status != 200:
            raise self._refusal(path, status, document)
        return document

    def _exchange(self, path: str) -> tuple[int, bytes]:
        assert self._host is not None
        connection: HTTPConnection
        if self._tls is None:
            connection = HTTPConnection(self._host, self._port, timeout=_MOST_SECONDS)
        else:
            connection = HTTPSConnection(self._host, self._port, timeout=_MOST_SECONDS, context=self._tls)
        try:
            connection.request("GET", path, headers=self._headers)
            response = connection.getresponse()
            return response.status, response.read(_MOST_BYTES)
        except socket.gaierror as error:
            raise OSError(f"no host is called {self._host!r}") from error
        finally:
            connection.close()

    def _refusal(self, path: str, status: int, document: dict[str, Any]) -> RequestError:
        if status == 404:
            return RequestError(
                f"{self.url} has nothing at {path} for this key"
                if "authorization" in self._headers
                else f"{self.url} has nothing at {path} for those without a key",
                status=404,
                code="not_found",
                hint=f"start the server with --admin-key-file FILE, and put the key into {KEY_VARIABLE}",
            )
        error = document.get("error")
        message = error.get("message") if isinstance(error, dict) else None
        code = error.get("code") if isinstance(error, dict) else None
        return RequestError(
            f"{self.url} refuses: {message or f'status {status}'}", status=status, code=str(code)
        )


def read_admin_key(path: Path | None) -> str | None:
    """The key that a file holds, on a line of its own, or that of the environment; None: there is none.

    Raises:
        OptionError: the file has no key, or the key's digest, which the server has.
    """
    if path is None:
        return os.environ.get(KEY_VARIABLE, "").strip() or None
    try:
        key = path.read_text(encoding="ascii").strip()
    except UnicodeDecodeError:
        key = ""
    if _DIGEST.fullmatch(key):
        raise OptionError(
            f"{path} has the digest of an admin key, which tells nobody the key",
            hint="write the key itself, as `fastserve keys FILE --admin` has printed it, or set "
            f"{KEY_VARIABLE}",
            option="key_file",
        )
    if not key.isprintable() or len(key.split()) != 1:
        raise OptionError(
            f"{path} is no file of a key: it has {len(key.splitlines())} lines",
            hint="write the admin key on one line, without spaces",
            option="key_file",
        )
    return key


def _no_url(url: str) -> OptionError:
    return OptionError(
        f"url={url!r} is not a server's URL", hint="write it as http://127.0.0.1:8000", option="url"
    )
