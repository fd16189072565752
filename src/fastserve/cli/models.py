"""`fastserve models`: what is in the local store, and by which names."""

from __future__ import annotations

import click

from fastserve.cli.command_group import CommandGroup
from fastserve.cli.option import json_option
from fastserve.cli.report import format_bytes, print_json, print_table

name_argument = click.argument("name", metavar="NAME", help="A name that `fastserve models list` shows.")


@click.group(cls=CommandGroup, no_args_is_help=False)
def models() -> None:
    """Downloaded models, their aliases and versions."""


@models.command("list")
@json_option
def list_(json: bool) -> None:
    """List models, downloaded or not.

    Those that are here come first, with the aliases and versions that stand for them, then those that
    `fastserve download` knows by name.
    """
    from fastserve.hub.catalogue import load_catalogue
    from fastserve.hub.registry import Registry

    registry = Registry.of_user()
    records, names = registry.records(), registry.names()
    here = {record.name for record in records}
    available = [entry for entry in load_catalogue() if entry.name not in here]
    if json:
        print_json(
            {
                "models": [record.to_json() for record in records],
                "available": [entry.to_json() for entry in available],
                **{key: value for key, value in names.to_json().items() if key != "version"},
            }
        )
        return
    rows = [(r.name, format_bytes(r.size_bytes), r.licence or "unknown", r.source) for r in records]
    rows += [(alias, "", "", f"alias of {target}") for alias, target in sorted(names.aliases.items())]
    for base, versions in sorted(names.versions.items()):
        for version, pinned in sorted(versions.items()):
            is_promoted = names.promoted.get(base) == version
            what = f"version that is {pinned.model}" + (f", promoted to {base}" if is_promoted else "")
            rows.append((f"{base}@{version}", "", "", what))
    rows += [(e.name, format_bytes(e.size_bytes), e.licence, "not downloaded") for e in available]
    print_table(("name", "size", "licence", "source"), rows)


@models.command("search")
@click.argument("words", metavar="WORD...", nargs=-1, required=True, help="Parts of a name, licence or kind.")
@json_option
def search(words: tuple[str, ...], json: bool) -> None:
    """Find models that `fastserve download` knows by name.

    Those are shown in whose name, title, licence, architecture or source all WORDs are. No network is used.
    """
    from fastserve.errors import ModelNotFoundError
    from fastserve.hub.catalogue import search as search_catalogue
    from fastserve.hub.registry import Registry, near_names

    found = search_catalogue(words)
    here = {record.name for record in Registry.of_user().records()}
    if json:
        print_json({"models": [{**entry.to_json(), "is_here": entry.name in here} for entry in found]})
        return
    if not found:
        near = near_names(words[0], [entry.name for entry in search_catalogue(())])
        hint = f"did you mean {' or '.join(near)}?" if near else "`fastserve models list` shows all of them"
        raise ModelNotFoundError(f"no model of the catalogue has {' '.join(words)!r}", hint=hint)
    print_table(
        ("name", "size", "licence", "architecture", "here"),
        [
            (e.name, format_bytes(e.size_bytes), e.licence, e.architecture, "yes" if e.name in here else "no")
            for e in found
        ],
    )


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


@models.command("alias")
@click.argument("name", metavar="ALIAS", help="A name such as chat, or a version such as chat@2.")
@click.argument("target", metavar="NAME", help="The model that it stands for, or another alias.")
@json_option
def alias(name: str, target: str, json: bool) -> None:
    """Have a name stand for a model.

    An alias can be pointed elsewhere later. A version, NAME@VERSION, stands for the model as its files are
    now, for good; `fastserve models promote` says which version NAME alone stands for.
    """
    from fastserve.hub.alias import add_alias

    model = add_alias(name, target)
    if json:
        print_json({"name": name.lower(), "target": target, "model": model})
    else:
        print(f"{name.lower()} stands for {model}")


@models.command("promote")
@click.argument("name", metavar="NAME@VERSION", help="A version that `fastserve models alias` has made.")
@json_option
def promote(name: str, json: bool) -> None:
    """Have NAME alone stand for a version.

    A server that knows NAME answers by that version from its next request on.
    """
    from fastserve.hub.alias import promote as promote_version

    before = promote_version(name)
    base, _, version = name.lower().rpartition("@")
    if json:
        print_json({"name": base, "version": version, "previous": before})
    else:
        instead = f", no longer for {base}@{before}" if before not in (None, version) else ""
        print(f"{base} stands for {base}@{version}{instead}")


@models.command("verify")
@click.argument(
    "names", metavar="[NAME]...", nargs=-1, help="Models, aliases or versions; by default all models."
)
@json_option
def verify(names: tuple[str, ...], json: bool) -> None:
    """Read all files of models and compare them with their checksums.

    The exit code is 2 where a file is not as it was when it was downloaded or registered.
    """
    from fastserve.hub.registry import list_models, show_model

    records = {record.name: record for record in map(show_model, names)} if names else None
    if records is None:
        records = {record.name: record for record in list_models()}
    problems = {name: record.verify() for name, record in records.items()}
    if json:
        print_json(
            {
                "models": [
                    {
                        "name": name,
                        "is_intact": not files,
                        "damaged": [{"path": path, "problem": problem} for path, problem in files.items()],
                    }
                    for name, files in problems.items()
                ]
            }
        )
    for name, files in problems.items():
        if not json:
            print(f"{name}: {'; '.join(f'{path} {text}' for path, text in files.items()) or 'intact'}")
    if any(problems.values()):
        click.get_current_context().exit(2)


@models.command("remove")
@name_argument
@json_option
def remove(name: str, json: bool) -> None:
    """Remove a model, an alias or a version.

    Deletes a model's files and what was made of them, or what an interrupted download left. A folder or file
    of your own, an alias and a version are only forgotten.
    """
    from fastserve.backends.native.packed_cache import prune
    from fastserve.checkpoint.archive_expansion import prune_expanded
    from fastserve.hub.alias import remove_name
    from fastserve.hub.registry import remove_model

    freed_bytes = 0 if remove_name(name) else remove_model(name) + prune_expanded() + prune()
    if json:
        print_json({"name": name, "freed_bytes": freed_bytes})
    else:
        print(f"removed {name}, {format_bytes(freed_bytes)} freed")
