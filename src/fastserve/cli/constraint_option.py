"""Options that say what a completion must be; at most one is given."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import click

from fastserve.constraint import Choice, Constraint, Grammar, JsonSchema, Regex
from fastserve.errors import ConstraintError, OptionError

Command = Callable[..., None]


def constraint_options(command: Command) -> Command:
    """Give a command these options; it gets them as one argument, `constraint`."""

    @wraps(command)
    def run(
        json_schema: str | None,
        regex: str | None,
        choice: Sequence[str],
        grammar: str | None,
        **values: Any,
    ) -> None:
        given = [
            name
            for name, value in (
                ("--json-schema", json_schema),
                ("--regex", regex),
                ("--choice", choice or None),
                ("--grammar", grammar),
            )
            if value is not None
        ]
        if len(given) > 1:
            raise OptionError(
                f"{' and '.join(given)} cannot be followed together", hint="give one; --choice may repeat"
            )
        constraint: Constraint | None = None
        if json_schema is not None:
            constraint = JsonSchema(_read_json(json_schema))
        elif regex is not None:
            constraint = Regex(regex)
        elif choice:
            constraint = Choice(choice)
        elif grammar is not None:
            constraint = Grammar(_read(grammar))
        command(constraint=constraint, **values)

    decorated: Command = run
    for option in (
        click.option(
            "--grammar", metavar="FILE", help="Write what the grammar in this file derives (Lark's syntax)."
        ),
        click.option(
            "--choice", metavar="TEXT", multiple=True, help="Write one of these texts; given several times."
        ),
        click.option("--regex", metavar="PATTERN", help="Write what this regular expression matches."),
        click.option(
            "--json-schema", metavar="FILE", help="Write JSON that the schema in this file accepts."
        ),
    ):
        decorated = option(decorated)
    return decorated


def _read_json(file: str) -> Any:
    try:
        return json.loads(_read(file))
    except (ValueError, RecursionError) as error:
        raise ConstraintError(f"{file} is no JSON: {error}") from error


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise OptionError(f"{file} cannot be read: {reason}", hint="name a file") from error
