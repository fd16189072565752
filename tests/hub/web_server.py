"""A web server of files in memory, which a test can make break off, change or lie."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@dataclass
class WebServer:
    files: dict[str, bytes] = field(default_factory=dict)
    etag: str | None = '"1"'
    break_after: int | None = None  # bytes of one answer, once
    announced: int | None = None  # a Content-Length that is wrong
    redirect_to: str | None = None
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # path and Range
    port: int = 0

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"


@contextmanager
def running() -> Iterator[WebServer]:
    state = WebServer()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            asked = self.headers["Range"]
            state.requests.append((self.path, asked))
            data = state.files.get(self.path.lstrip("/").partition("?")[0])
            if state.redirect_to is not None and data is None:
                self.send_response(302)
                self.send_header("Location", state.redirect_to)
                self.end_headers()
                return
            if data is None:
                self.send_error(404)
                return
            start = 0
            if asked and self.headers["If-Range"] in (None, state.etag):
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(data) > 0 and start:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            if state.etag:
                self.send_header("ETag", state.etag)
            if state.announced != -1:
                self.send_header("Content-Length", str(state.announced or len(data) - start))
            self.end_headers()
            body = data[start:]
            if state.break_after is not None:
                body, state.break_after = body[: state.break_after], None
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.port = server.server_address[1]
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
