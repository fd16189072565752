"""`fastserve ensemble`: several models of one task as one that is served like any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from fastserve.cli.option import (
    json_option,
    network_forbidden,
    offline_option,
    on_problem_option,
    printed_problems,
)
from fastserve.cli.report import print_json, print_table
from fastserve.errors import OptionError
from fastserve.models.ensemble import EnsembleMethod

if TYPE_CHECKING:
    from fastserve.tune.ensemble import EnsembleResult


@click.command()
@click.argument(
    "members", metavar="MODEL...", nargs=-1, required=True, help="Two models or more, tuned for one task."
)
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="Folder to make; must not be there."
)
@click.option(
    "--method",
    type=click.Choice(get_args(EnsembleMethod)),
    default="average",
    help="Mean of probabilities, most votes, or a logistic regression on probabilities, learned from --data.",
)
@click.option(
    "--weights", metavar="W,W,...", help="Of average and vote: one for each model; by default equal."
)
@click.option(
    "--data", type=click.Path(path_type=Path), help="Rows that none was trained on, to learn from and score."
)
@click.option(
    "--penalty", type=float, default=1.0, help="Of stacking, for large coefficients; more trusts --data less."
)
@click.option(
    "--truncate", is_flag=True, help="Cut rows that are too long for a model; else they are refused."
)
@on_problem_option
@json_option
@offline_option
def ensemble(
    members: Sequence[str],
    output: Path,
    method: EnsembleMethod,
    weights: str | None,
    data: Path | None,
    penalty: float,
    truncate: bool,
    on_problem: Mapping[str, str],
    json: bool,
    offline: bool,
) -> None:
    """Make several models into one.

    They were tuned for the same labels of texts, pairs, relations or tags; OUTPUT holds them all, and is
    evaluated and served as one model.
    """
    from fastserve.tune.ensemble import make_ensemble

    if offline:
        click.get_current_context().with_resource(network_forbidden())
    with printed_problems() as report_problem:
        result = make_ensemble(
            members,
            output,
            method=method,
            weights=None if weights is None else _parse_weights(weights),
            data=data,
            penalty=penalty,
            truncate=truncate,
            on_problem=on_problem,
            report_problem=report_problem,
        )
    if json:
        print_json(result.to_json())
    else:
        _print(result)


def _parse_weights(text: str) -> list[float]:
    try:
        return [float(weight) for weight in text.split(",")]
    except ValueError:
        raise OptionError(
            f"weights={text!r} has what is no number", hint="write such as 2,1,1", option="weights"
        ) from None


def _print(result: EnsembleResult) -> None:
    if result.metrics:
        names = sorted(result.metrics)
        rows = [
            [name, *(f"{metrics[metric]:.4f}" for metric in names)]
            for name, metrics in [
                *zip(result.members, result.member_metrics, strict=True),
                (str(result.path), result.metrics),
            ]
        ]
        print_table(["model", *names], rows)
    print(f"{result.path}: {len(result.members)} models by {result.settings.method}")
