"""`fastserve keys`: API keys of a server."""

from __future__ import annotations

from pathlib import Path

import click

from fastserve.cli.option import json_option
from fastserve.cli.report import print_json


@click.command()
@click.argument(
    "file", type=click.Path(path_type=Path, dir_okay=False), help="File of keys; made if missing."
)
@click.argument("name", help="Whose key it is: the tenant of its requests.")
@json_option
def keys(file: Path, name: str, json: bool) -> None:
    """Make an API key for `fastserve serve --api-keys FILE`.

    The key is printed once; the file has its digest, which tells nobody the key.
    """
    from fastserve.serve.security import add_key

    key = add_key(file, name)
    if json:
        print_json({"name": name, "key": key})
    else:
        print(key)
