"""Options that several commands share, so that each has one name, one help text and one meaning."""

from __future__ import annotations

from typing import Annotated

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
OfflineOption = Annotated[
    bool, typer.Option("--offline", help="Open no network connection (also: FASTSERVE_OFFLINE=1).")
]
