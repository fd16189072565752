"""`fastserve models`: list, show and remove what is in the local store."""

from __future__ import annotations

import click

from fastserve.cli.command_group import CommandGroup
from fastserve.cli.option import json_option
from fastserve.cli.report import format_bytes, print_json, print_table

name_argument = click.argument("name", metavar="NAME", help="A name that `fastserve models list` shows.")


@click.group(cls=CommandGroup, no_args_is_help=False)
def models() -> None:
    """List, show and remove downloaded models."""


@models.command("list")
@json_option
def list_(json: bool) -> None:
    """List models, downloaded or not.

    Those that are here come first, then those that `fastserve download` knows by name.
    """
    from fastserve.hub.catalogue import load_catalogue
    from fastserve.hub.registry import list_models

    records = list_models()
    here = {record.name for record in records}
    available = [entry for entry in load_catalogue() if entry.name not in here]
    if json:
        print_json(
            {
                "models": [record.to_json() for record in records],
                "available": [entry.to_json() for entry in available],
            }
        )
        return
    rows = [(r.name, format_bytes(r.size_bytes), r.licence or "unknown", r.source) for r in records]
    rows += [(e.name, format_bytes(e.size_bytes), e.licence, "not downloaded") for e in available]
    print_table(("name", "size", "licence", "source"), rows)


@models.command("show")
@name_argument
@json_option
def show(name: str, json: bool) -> None:
    """Show a model's source, licence and files."""
    from fastserve.hub.registry import show_model

    record = show_model(name)
    if json:
        print_json(record.to_json())
        return
    print(f"name      {record.name}")
    print(f"source    {record.source}")
    print(f"licence   {record.licence or 'unknown'}")
    print(f"path      {record.path}")
    print(f"size      {format_bytes(record.size_bytes)}")
    print(f"added     {record.registered_at}")
    print_table(
        ("file", "size", "sha256"),
        [(file.path, format_bytes(file.size_bytes), file.sha256) for file in record.files],
    )


@models.command("remove")
@name_argument
@json_option
def remove(name: str, json: bool) -> None:
    """Remove a model.

    Deletes its files and what was made of them, or what an interrupted download left. A folder or file of
    your own is only forgotten.
    """
    from fastserve.backends.native.packed_cache import prune
    from fastserve.hub.registry import remove_model

    freed_bytes = remove_model(name) + prune()
    if json:
        print_json({"name": name, "freed_bytes": freed_bytes})
    else:
        print(f"removed {name}, {format_bytes(freed_bytes)} freed")
