"""`fastserve doctor`: what there is to know when something is off."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from fastserve.cli.option import json_option
from fastserve.cli.report import print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastserve.cli.diagnosis import Check


@click.command()
@json_option
def doctor(json: bool) -> None:
    """Check this installation and this machine.

    Says what to do about what is wrong. The exit code is 2 if there is a problem; warnings alone leave it 0.
    """
    from fastserve.cli.diagnosis import diagnose

    checks = list(diagnose())
    num_problems = _count(checks, "problem")
    if json:
        print_json({"checks": [asdict(check) for check in checks], "problems": num_problems})
    else:
        _print_checks(checks)
    raise click.exceptions.Exit(2 if num_problems else 0)


def _print_checks(checks: Sequence[Check]) -> None:
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{check.status:<7}  {check.name:<{width}}  {check.finding}")
        if check.remedy:
            print(f"{'':7}  {'':{width}}  hint: {check.remedy}")
    if all(check.status == "ok" for check in checks):
        print("\nall is well")
    else:
        print(f"\nproblems: {_count(checks, 'problem')}, warnings: {_count(checks, 'warning')}")


def _count(checks: Sequence[Check], status: str) -> int:
    return sum(check.status == status for check in checks)
