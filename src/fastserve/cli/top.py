"""`fastserve top`: the scheduler of a server at work, in a terminal."""

from __future__ import annotations

import os
import select
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from fastserve.cli.admin_client import AdminClient, read_admin_key
from fastserve.cli.option import json_option
from fastserve.cli.report import print_json
from fastserve.cli.status_screen import clean, render
from fastserve.errors import FastServeError, OptionError

_ENTER = "\x1b[?1049h\x1b[?25l"  # a screen of its own, without a cursor
_LEAVE = "\x1b[?25h\x1b[?1049l"
_PLAIN_WIDTH, _PLAIN_HEIGHT = 160, 200  # where it is no terminal
_QUIT = ("q", "Q", "\x1b", "\x04")


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", help="URL of the server, without /v1.")
@click.option(
    "--key-file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="File that has the admin key; by default the key of FASTSERVE_ADMIN_KEY.",
)
@click.option(
    "--interval-seconds",
    type=click.FloatRange(0.1, 60.0),
    default=1.0,
    help="How often to look.",
)
@json_option
def top(url: str, key_file: Path | None, interval_seconds: float, json: bool) -> None:
    """Show who waits, who runs and who was preempted in a server.

    Looks until q or Ctrl-C is pressed; where standard output is no terminal, and with --json, once. The
    server needs --admin-key-file.
    """
    client = AdminClient(url, key=read_admin_key(key_file))
    status = client.get("/admin/status")
    if json:
        print_json(status)
    elif sys.stdout.isatty():
        _watch(client, _check(status, url), interval_seconds)
    else:
        print("\n".join(render(_check(status, url), width=_PLAIN_WIDTH, height=_PLAIN_HEIGHT)).rstrip())


def _check(status: dict[str, Any], url: str) -> dict[str, Any]:
    """
    Raises:
        OptionError: it is no status, or that of another version.
    """
    try:
        render(status, width=_PLAIN_WIDTH, height=_PLAIN_HEIGHT)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OptionError(
            f"{url} tells its status in another way than this version reads it",
            hint="use the fastserve of the server's version, or --json",
            option="url",
        ) from error
    return status


def _watch(client: AdminClient, status: dict[str, Any], interval_seconds: float) -> None:
    """Draw until somebody has enough of it. A server that is away for a while is waited for."""
    before: dict[str, Any] | None = None
    trouble: str | None = None
    with _own_screen(), _keys() as wait_for_key:
        while True:
            _draw(status, before, trouble, client.url)
            if wait_for_key(interval_seconds):
                return
            try:
                latest = _check(client.get("/admin/status"), client.url)
            except FastServeError as error:
                trouble = error.message
            else:
                before, status, trouble = status, latest, None


def _draw(status: dict[str, Any], before: dict[str, Any] | None, trouble: str | None, url: str) -> None:
    width, height = shutil.get_terminal_size()
    has_colors = "NO_COLOR" not in os.environ
    lines = render(status, before=before, width=width, height=height - 1, has_colors=has_colors)
    foot = f"{url}   q ends" if trouble is None else f"{trouble}; as of {_age(status)} ago   q ends"
    foot = clean(foot, width)
    text = "".join(f"{line}\x1b[K\r\n" for line in lines)
    sys.stdout.write(f"\x1b[H{text}\x1b[J\x1b[{height};1H{foot}")
    sys.stdout.flush()


def _age(status: dict[str, Any]) -> str:
    return f"{max(time.time() - status['time'], 0):.0f} s"


@contextmanager
def _own_screen() -> Iterator[None]:
    """What the terminal showed is there again afterwards."""
    sys.stdout.write(_ENTER)
    try:
        yield
    finally:
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()


@contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """A function that waits so many seconds, and says whether a key was pressed that ends the command."""
    if sys.platform == "win32" or not sys.stdin.isatty():

        def sleep(seconds: float) -> bool:
            time.sleep(seconds)
            return False

        yield sleep
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def wait(seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select([descriptor], [], [], left)
            if ready:
                pressed = os.read(descriptor, 64).decode("latin-1")
                if not pressed or pressed in _QUIT:
                    return True
        return False

    try:
        tty.setcbreak(descriptor)
        yield wait
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
