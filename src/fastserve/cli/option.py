"""Options that several commands share, so that each has one name, one help text and one meaning."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import click

json_option = click.option("--json", is_flag=True, help="Print one JSON document on standard output.")
offline_option = click.option(
    "--offline", is_flag=True, help="Open no network connection (also: FASTSERVE_OFFLINE=1)."
)


@contextmanager
def network_forbidden() -> Iterator[None]:
    """Have FASTSERVE_OFFLINE set meanwhile, for whatever runs and is started within."""
    before = os.environ.get("FASTSERVE_OFFLINE")
    os.environ["FASTSERVE_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["FASTSERVE_OFFLINE"]
        else:
            os.environ["FASTSERVE_OFFLINE"] = before
