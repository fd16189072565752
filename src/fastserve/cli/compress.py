"""`fastserve compress`: a model made smaller and faster by a recipe, the loss measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastserve.cli.command_group import CommandWithSubcommands
from fastserve.cli.engine_option import model_argument
from fastserve.cli.option import json_option, network_forbidden, offline_option
from fastserve.cli.progress_bar import step_progress
from fastserve.cli.report import print_json, print_table
from fastserve.errors import OptionError

if TYPE_CHECKING:
    from fastserve.compress import CompressResult

REFUSED = 3

_SUBCOMMANDS = {"diff": "fastserve.cli.compress_diff"}

_EPILOG = """\b
Where two models differ (by layer, token and answer):
  fastserve compress diff A B --data FILE

\b
Of --budget: size<=60MB (or <=22%, of the source), memory<=1GB, quality>=-1%, kl<=0.01, agreement>=99%,
decode<=8ms, prefill<=300ms; of encoders latency<=5ms.
"""

_Path = click.Path(path_type=Path)


@click.command(cls=CommandWithSubcommands, modules=_SUBCOMMANDS, epilog=_EPILOG)
@model_argument
@click.option(
    "--recipe",
    "recipes",
    multiple=True,
    metavar="NAME|FILE",
    help="A recipe that ships, or a file of one. With --budget, several are searched, or some that ship "
    "where none is named: whole, and mixed by layer groups.",
)
@click.option("--output", required=True, type=_Path, metavar="DIR", help="Folder to make; must not be there.")
@click.option("--budget", metavar="LIMITS", help="What the artifact must keep, or it is refused; see below.")
@click.option("--trials", type=click.IntRange(0), default=6, help="Mixtures of recipes that are measured.")
@click.option(
    "--archive",
    is_flag=True,
    help="DIR is an archive: entropy-coded, exactly, for small links and disks; it is expanded where opened.",
)
@click.option("--accept", is_flag=True, help="Have the artifact whatever the budget says.")
@click.option("--calibration", type=_Path, metavar="FILE", help="Text, or rows, to calibrate steps on.")
@click.option("--data", type=_Path, metavar="FILE", help="Text, or rows of its task, to judge the model by.")
@click.option("--limit", type=click.IntRange(1), help="Judge by so many rows, or windows of 512 tokens.")
@click.option("--train", type=_Path, metavar="FILE", help="Rows, or text, for steps that tune.")
@click.option("--dev", type=_Path, metavar="FILE", help="Rows that choose the best weights of such steps.")
@click.option("--task", metavar="NAME", help="Task of these rows, as of `fastserve tune`.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of all that is drawn.")
@click.option("--threads", type=click.IntRange(1), help="Of the runtime; by default as many as cores.")
@click.option("--resume", is_flag=True, help="Go on with the unfinished run of this output, if there is one.")
@json_option
@offline_option
def compress(
    model: str,
    recipes: Sequence[str],
    output: Path,
    budget: str | None,
    trials: int,
    archive: bool,
    accept: bool,
    calibration: Path | None,
    data: Path | None,
    limit: int | None,
    train: Path | None,
    dev: Path | None,
    task: str | None,
    seed: int,
    threads: int | None,
    resume: bool,
    json: bool,
    offline: bool,
) -> None:
    """Compress a model by a recipe or under a budget, and report what it gained and lost.

    DIR is then a model directory that `fastserve serve` and, where a format for it exists, transformers and
    vLLM open, with a card and a report (compression/report.html). Exit code 3: it does not keep the budget.
    """
    from fastserve.compress import CompressData, compress_to_budget
    from fastserve.compress import compress as run_compress

    if offline:
        click.get_current_context().with_resource(network_forbidden())
    given = CompressData(calibration=calibration, judged=data, train=train, dev=dev, task=task)
    options: dict[str, Any] = {
        "output": output,
        "data": given,
        "archive": archive,
        "accept": accept,
        "resume": resume,
        "limit": limit,
        "seed": seed,
        "threads": threads,
    }
    with step_progress(shown=not json) as progress:
        if len(recipes) == 1:
            result = run_compress(model, recipe=recipes[0], budget=budget, progress=progress, **options)
        elif budget is None:
            raise OptionError(
                f"{len(recipes) or 'no'} recipes are named, and no budget to search among them by",
                hint='name one with --recipe, or give such as --budget "size<=60MB quality>=-1%"',
                option="recipe",
            )
        else:
            result = compress_to_budget(
                model, budget=budget, recipes=recipes, trials=trials, progress=progress, **options
            )
    if json:
        print_json({**result.report, "output": str(output), "is_refused": result.is_refused})
    else:
        _print(result, output)
    if result.is_refused:
        click.get_current_context().exit(REFUSED)


def _print(result: CompressResult, output: Path) -> None:
    from fastserve.compress.report import SEARCH_HEADER, report_lines, report_rows, search_rows

    if rows := search_rows(result.report):
        print_table(SEARCH_HEADER, rows)
        print()
    print_table(["", "before", "after", "change (95 % interval)"], report_rows(result.report))
    for line in report_lines(result.report):
        print(line)
    if result.is_refused:
        print(f"refused: {output} is not made; the same command with --resume --accept makes it all the same")
    else:
        print(f"wrote {output}; see {output / 'compression' / 'report.html'}")
