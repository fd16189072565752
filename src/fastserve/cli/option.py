"""Options that several commands share, so that each has one name, one help text and one meaning."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from fastserve.data.problem import Problem

json_option = click.option("--json", is_flag=True, help="Print one JSON document on standard output.")
offline_option = click.option(
    "--offline", is_flag=True, help="Open no network connection (also: FASTSERVE_OFFLINE=1)."
)

_MOST_PRINTED = 20  # problems on a screen; there may be one in each row


def parse_pairs(
    what: str,
) -> Callable[[click.Context, click.Parameter, Sequence[str]], dict[str, str]]:
    """A callback for options of the form NAME=VALUE, which may be given several times."""

    def parse(context: click.Context, parameter: click.Parameter, texts: Sequence[str]) -> dict[str, str]:
        pairs = {}
        for text in texts:
            name, separator, value = text.partition("=")
            if not (name and separator and value):
                raise click.BadParameter(f"{text!r} is not of the form {what}")
            pairs[name] = value
        return pairs

    return parse


on_problem_option = click.option(
    "--on-problem",
    multiple=True,
    metavar="KIND=ACTION",
    callback=parse_pairs("KIND=ACTION"),
    help="What to do about a kind of problem in the rows, as of `fastserve prepare`; may be repeated.",
)


@contextmanager
def printed_problems() -> Iterator[Callable[[Problem], None]]:
    """A function that prints problems of data on standard error, the first twenty; how many more there were
    is said at the end. Fatal ones are for the error to tell."""
    num_problems = 0

    def report(problem: Problem) -> None:
        nonlocal num_problems
        if problem.action == "error":
            return
        num_problems += 1
        if num_problems <= _MOST_PRINTED:
            print(problem, file=sys.stderr)

    try:
        yield report
    finally:
        if num_problems > _MOST_PRINTED:
            print(f"... and {num_problems - _MOST_PRINTED} more problems of the data", file=sys.stderr)


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
