"""`fastserve keys`: API keys of a server, and its admin key."""

from __future__ import annotations

from pathlib import Path

import click

from fastserve.cli.option import json_option
from fastserve.cli.report import print_json
from fastserve.errors import OptionError


@click.command()
@click.argument(
    "file", type=click.Path(path_type=Path, dir_okay=False), help="File of keys; made if missing."
)
@click.argument("name", required=False, help="Whose key it is.")
@click.option("--tenant", help="Tenant of its requests; several keys may have one. By default the name.")
@click.option("--weight", type=float, help="Share of the tenant: with 2 it gets twice the service of others.")
@click.option("--requests-per-minute", type=int, help="Most requests of the tenant; more are refused.")
@click.option("--tokens-per-minute", type=int, help="Most tokens of its prompts and completions.")
@click.option("--max-concurrent", type=int, help="Most of its requests that run or wait at a time.")
@click.option("--expires", metavar="DATE", help="Last day that the key is good for (UTC): 2027-01-31.")
@click.option("--admin", is_flag=True, help="Make an admin key, for `--admin-key-file FILE`.")
@json_option
def keys(
    file: Path,
    name: str | None,
    tenant: str | None,
    weight: float | None,
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    max_concurrent: int | None,
    expires: str | None,
    admin: bool,
    json: bool,
) -> None:
    """Make an API key for `fastserve serve --tenants FILE`.

    The key is printed once; the file has its digest, which tells nobody the key. A server that runs takes it
    in by itself. Limits belong to the tenant: of its keys one has to say them.
    """
    from fastserve.serve.key_file import Terms, add_admin_key, add_key, parse_day

    terms = {
        "weight": weight,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_concurrent": max_concurrent,
    }
    if admin:
        others = {"NAME": name, "tenant": tenant, **terms, "expires": expires}
        if given := [option for option, value in others.items() if value is not None]:
            raise OptionError(f"{given[0]} has no use with --admin", hint="leave one of the two out")
        name, key = "admin", add_admin_key(file)
    elif name is None:
        raise OptionError("there is no NAME", hint="say whose key it is, or choose --admin")
    else:
        day = None if expires is None else parse_day(expires)
        key = add_key(file, name, tenant=tenant, terms=Terms(**terms), expires=day)  # type: ignore[arg-type]
    if json:
        print_json({"name": name, "key": key})
    else:
        print(key)
