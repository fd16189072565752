"""Options that several commands share, so that each has one name, one help text and one meaning."""

from __future__ import annotations

import click

json_option = click.option("--json", is_flag=True, help="Print one JSON document on standard output.")
offline_option = click.option(
    "--offline", is_flag=True, help="Open no network connection (also: FASTSERVE_OFFLINE=1)."
)
