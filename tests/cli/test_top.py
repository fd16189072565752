"""`fastserve top` against a server that is not there, one that is none of ours, and one that is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from cli.test_status_screen import STATUS
from fastserve.cli.main import main

KEY = "fs-admin-secret"


class FakeAdmin:
    """Answers /admin/status to whoever has the key; the body may be another."""

    def __init__(self) -> None:
        self.body: bytes = json.dumps(STATUS).encode()
        self.status = 200
        self.key: str | None = KEY
        self.num_asked = 0
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.num_asked += 1
                is_known = fake.key is None or self.headers["authorization"] == f"Bearer {fake.key}"
                is_there = is_known and self.path == "/admin/status"
                body = fake.body
                if not is_there:
                    body = json.dumps(
                        {"error": {"message": "there is nothing", "code": "not_found"}}
                    ).encode()
                self.send_response(fake.status if is_there else 404)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = Thread(target=self._server.serve_forever)
        self._thread.start()
        self._is_closed = False
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAdmin]:
    monkeypatch.setenv("FASTSERVE_ADMIN_KEY", KEY)
    fake = FakeAdmin()
    yield fake
    fake.close()


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["top", *arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


def test_where_it_is_no_terminal_the_status_is_printed_once(admin, capsys) -> None:
    assert main(["top", "--url", admin.url]) == 0
    shown = capsys.readouterr().out
    assert "policy boost:strength=2" in shown
    assert "req-abc" in shown
    assert "\x1b" not in shown
    assert admin.num_asked == 1


@pytest.mark.parametrize("suffix", ["", "/", "/v1"])
def test_machines_get_the_document_as_the_server_gives_it(admin, capsys, suffix: str) -> None:
    assert main(["top", "--url", admin.url + suffix, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == STATUS


def test_the_key_may_come_from_a_file(admin, capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FASTSERVE_ADMIN_KEY")
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    assert main(["top", "--url", admin.url, "--key-file", str(path), "--json"]) == 0
    path.write_text("another\n")
    assert "has nothing at /admin/status for this key" in error_of(
        capsys, "--url", admin.url, "--key-file", str(path)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"admin " + b"0" * 64, "has the digest of an admin key"),
        (b"one two", "is no file of a key"),
        (b"one\ntwo\n", "is no file of a key"),
        (b"", "is no file of a key"),
        (b"\xff\xfe", "is no file of a key"),
    ],
)
def test_a_file_without_a_key_is_refused(capsys, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    assert message in error_of(capsys, "--key-file", str(path))


def test_without_the_key_the_remedy_is_named(admin, capsys, monkeypatch) -> None:
    monkeypatch.delenv("FASTSERVE_ADMIN_KEY")
    error = error_of(capsys, "--url", admin.url)
    assert "for those without a key" in error
    assert "FASTSERVE_ADMIN_KEY" in error


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://h:no", "http://h/?a=1"])
def test_what_is_no_url_is_refused(capsys, url: str) -> None:
    assert f"url={url!r} is not a server's URL" in error_of(capsys, "--url", url)


@pytest.mark.parametrize("key", ["two words", "línea", "a\nb"])
def test_what_can_be_no_key_is_refused(admin, capsys, monkeypatch, key: str) -> None:
    monkeypatch.setenv("FASTSERVE_ADMIN_KEY", key)
    assert "the admin key is not one word of ASCII" in error_of(capsys, "--url", admin.url)


@pytest.mark.parametrize("url", ["http://a..b", "http://localhost:1/ü"])
def test_a_url_that_cannot_be_asked_is_an_error_of_one_line(capsys, url: str) -> None:
    assert f"{url} does not answer" in error_of(capsys, "--url", url)


def test_where_nobody_listens_that_is_said(admin, capsys) -> None:
    admin.close()
    assert f"{admin.url} does not answer: Connection refused" in error_of(capsys, "--url", admin.url)
    assert main(["top", "--url", admin.url, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "OptionError"


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, b"<html>", "and no JSON"),
        (200, b"[]", "and no JSON"),
        (200, b'{"time": 1}', "in another way than this version reads it"),
        (503, b'{"error": {"message": "it ends"}}', "refuses: it ends"),
        (500, b"{}", "refuses: status 500"),
    ],
)
def test_who_is_no_server_of_ours_is_named(admin, capsys, status: int, body: bytes, message: str) -> None:
    admin.status, admin.body = status, body
    assert message in error_of(capsys, "--url", admin.url)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo terminals")
def test_in_a_terminal_it_looks_until_q_is_pressed(admin) -> None:
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "fastserve.cli.main", "top", "--url", admin.url]
    process = subprocess.Popen(
        [*command, "--interval-seconds", "0.2"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "COLUMNS": "120", "LINES": "30", "TERM": "xterm"},
    )
    os.close(theirs)
    shown = read_until(ours, lambda text: text.count("policy boost:strength=2") >= 2)
    assert "\x1b[?1049h" in shown
    assert "\x1b[32m" in shown
    admin.status = 503
    read_until(ours, lambda text: "refuses" in text)
    admin.status, admin.body = 200, json.dumps({**STATUS, "version": "9.9.9"}).encode()
    read_until(ours, lambda text: "fastserve 9.9.9" in text)
    os.write(ours, b"q")
    rest = read_until(ours, lambda text: "\x1b[?1049l" in text)
    assert rest.endswith("\x1b[?25h\x1b[?1049l")
    assert process.wait(20) == 0
    os.close(ours)


def read_until(descriptor: int, is_enough: Callable[[str], Any]) -> str:
    """What a terminal shows until that is enough, for a while."""
    text, deadline = "", time.monotonic() + 30
    while not is_enough(text):
        assert time.monotonic() < deadline, text
        text += os.read(descriptor, 65536).decode()
    return text
