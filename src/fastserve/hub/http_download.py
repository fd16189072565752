"""Brings one file of a web server: what came survives an interruption, and is never more than announced."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastserve.errors import DownloadError
from fastserve.hub.disk import require_free_bytes
from fastserve.hub.progress import Progress
from fastserve.hub.source import SourceUnavailableError

# Of a file whose size the server does not tell; of others the free space of the disk is the limit.
MAX_UNANNOUNCED_BYTES = 64 * 2**30

_CHUNK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 60
_ATTEMPTS = 3  # as long as each brings something
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Part:
    """What is known of a file that is not whole yet: kept beside it."""

    url: str
    validator: str | None  # ETag or date: the server goes on only with the same file


def download_file(url: str, path: Path, *, sha256: str | None, step: str, progress: Progress | None) -> None:
    """Write the file at `url` to `path`, going on from `PATH.part` where that is of the same file.

    Raises:
        SourceUnavailableError: the server does not answer, does not have it, or breaks off; what came is
            kept.
        DownloadError: the file is larger than announced, has another checksum (it is removed then), or the
            disk is too small.
    """
    part = path.with_name(path.name + ".part")
    for attempt in range(1, _ATTEMPTS + 1):
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch(url, part, is_pinned=sha256 is not None, step=step, progress=progress)
            break
        except SourceUnavailableError as error:
            came = (part.stat().st_size if part.exists() else 0) > before
            if not came or attempt == _ATTEMPTS:
                raise
            _logger.warning("%s; going on from there", error.message)
    if sha256 is not None:
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            part.unlink()
            raise DownloadError(
                f"{url} has the sha256 {found}, not {sha256}",
                hint="it is another file than was meant, or was damaged on the way; it was removed",
            )
    _note(part).unlink(missing_ok=True)
    part.replace(path)


def _fetch(url: str, part: Path, *, is_pinned: bool, step: str, progress: Progress | None) -> None:
    done_bytes, validator = _resume_point(url, part, is_pinned=is_pinned)
    request = urllib.request.Request(url, headers={"User-Agent": "fastserve", "Accept-Encoding": "identity"})
    if done_bytes:
        request.add_header("Range", f"bytes={done_bytes}-")
        if validator is not None:
            request.add_header("If-Range", validator)
    try:
        response = urllib.request.build_opener(_SafeRedirects()).open(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and done_bytes:
            if error.headers["Content-Range"] == f"bytes */{done_bytes}":
                return  # the part is the whole
            part.unlink()
        raise _unavailable(url, f"the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _unavailable(url, str(getattr(error, "reason", error))) from error
    with response:
        start = _start_of(response)
        if start not in (0, done_bytes):
            raise _unavailable(
                url, f"the server sends bytes from {start}, asked were those from {done_bytes}"
            )
        length = response.headers["Content-Length"]
        total_bytes = start + int(length) if length and length.isdecimal() else None
        require_free_bytes(part.parent, (total_bytes or start) - start)
        _note(part).write_text(json.dumps(asdict(_Part(url, _validator(response)))), encoding="utf-8")
        report = _reporter(progress, step, total_bytes)
        with part.open("r+b" if start else "wb") as file:
            file.seek(start)
            _copy(response, file, url, start, total_bytes, report)


def _copy(
    response: Any, file: Any, url: str, start: int, total_bytes: int | None, report: Callable[[int], None]
) -> None:
    limit = MAX_UNANNOUNCED_BYTES if total_bytes is None else total_bytes
    done_bytes = start
    while True:
        try:
            chunk = response.read(_CHUNK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise _unavailable(url, f"it broke off after {done_bytes} bytes: {error}") from error
        if not chunk:
            break
        done_bytes += len(chunk)
        if done_bytes > limit:
            raise DownloadError(f"{url} sends more than {limit} bytes", hint="do not trust its source")
        file.write(chunk)
        report(done_bytes)
    if total_bytes is not None and done_bytes < total_bytes:
        raise _unavailable(url, f"it broke off after {done_bytes} of {total_bytes} bytes")


def _resume_point(url: str, part: Path, *, is_pinned: bool) -> tuple[int, str | None]:
    """How much of the same file is here, and by what the server knows it."""
    try:
        known = _Part(**json.loads(_note(part).read_text(encoding="utf-8")))
        done_bytes = part.stat().st_size
    except (OSError, TypeError, ValueError):
        return 0, None
    if known.url != url or (known.validator is None and not is_pinned):
        return 0, None
    return done_bytes, known.validator


def _note(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _validator(response: Any) -> str | None:
    etag: str | None = response.headers["ETag"]
    date: str | None = response.headers["Last-Modified"]
    return etag if etag and not etag.startswith("W/") else date


def _start_of(response: Any) -> int:
    """The first byte that comes: not that of a range where the server sends the whole."""
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        return 0
    match = _CONTENT_RANGE.fullmatch(response.headers["Content-Range"] or "")
    return int(match[1]) if match else -1


def _reporter(progress: Progress | None, step: str, total_bytes: int | None) -> Callable[[int], None]:
    def report(done_bytes: int) -> None:
        if progress is not None:
            progress(step, done_bytes, total_bytes)

    return report


def _unavailable(url: str, reason: str) -> SourceUnavailableError:
    return SourceUnavailableError(
        f"{url} could not be fetched: {reason}", hint="check the address and the network, and try again"
    )


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows to other servers, but not from https to what anybody on the way could change."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if not newurl.startswith("https://") and not (req.type == "http" and newurl.startswith("http://")):
            if fp is not None:
                fp.close()
            raise urllib.error.URLError(f"it leads on to {newurl}, which is not encrypted")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
