"""`fastserve evaluate`: how good, and how fast, a model directory is on labelled rows."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from fastserve.cli.option import json_option, on_problem_option, printed_problems
from fastserve.cli.report import print_json, print_table
from fastserve.config import WeightsChoice

if TYPE_CHECKING:
    from fastserve.data.row import Row
    from fastserve.evaluate.bootstrap import Interval
    from fastserve.evaluate.probe import ProbeReport
    from fastserve.evaluate.task_evaluation import Evaluation


_BACKENDS = {"native": "the native runtime", "torch": "PyTorch"}


@click.command()
@click.argument(
    "folder", metavar="DIR", type=click.Path(path_type=Path), help="A model directory with a task."
)
@click.option("--data", required=True, type=click.Path(path_type=Path), help="File of labelled rows.")
@click.option("--compare", type=click.Path(path_type=Path), help="Another model directory, on the same rows.")
@on_problem_option
@click.option("--limit", type=click.IntRange(1), help="Only so many rows, the first of the file.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "native", "torch"]),
    default="auto",
    help="What computes; auto is native, or PyTorch where the native runtime does not have the model.",
)
@click.option(
    "--weights", type=click.Choice(get_args(WeightsChoice)), default="auto", help="Format of native weights."
)
@click.option("--threads", type=click.IntRange(1), help="Of the native runtime.")
@click.option(
    "--truncate", is_flag=True, help="Cut rows that are too long for the model; else they are refused."
)
@click.option("--max-tokens", type=click.IntRange(1), default=128, help="Of each text that is generated.")
@click.option("--resamples", type=click.IntRange(10), default=1000, help="Of the bootstrap of --compare.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the bootstrap.")
@click.option(
    "--probes",
    is_flag=False,
    flag_value="",
    metavar="[FILE]",
    help="Probe a classifier for bias: names, groups and negations swapped; by a JSON file, or our own.",
)
@click.option("--report", type=click.Path(path_type=Path), help="Write a page and plots into that folder.")
@click.option(
    "--predictions", type=click.Path(path_type=Path), help="Write predictions there, as JSON lines."
)
@json_option
def evaluate(
    folder: Path,
    data: Path,
    compare: Path | None,
    on_problem: Mapping[str, str],
    limit: int | None,
    backend: str,
    weights: str,
    threads: int | None,
    truncate: bool,
    max_tokens: int,
    resamples: int,
    seed: int,
    probes: str | None,
    report: Path | None,
    predictions: Path | None,
    json: bool,
) -> None:
    """Score a model directory on labelled rows.

    Prints metrics, figures by label, and speed. With --compare, how much better it is than another, with 95 %
    intervals of a paired bootstrap.
    """
    from fastserve.evaluate.prediction import PredictorOptions
    from fastserve.evaluate.probe import read_probes
    from fastserve.evaluate.task_evaluation import compare as compare_evaluations
    from fastserve.evaluate.task_evaluation import evaluate_folder

    rows = _read_rows(folder, data, limit, on_problem)
    options = PredictorOptions(
        backend=backend,  # type: ignore[arg-type] # one of the choices above
        weights=weights,  # type: ignore[arg-type]
        threads=threads,
        truncate=truncate,
        max_tokens=max_tokens,
    )
    chosen = None if probes is None else read_probes(Path(probes) if probes else None)
    evaluation = evaluate_folder(folder, rows, options, probes=chosen, note=_note)
    intervals: Mapping[str, Interval] = {}
    other: Evaluation | None = None
    if compare is not None:
        other = evaluate_folder(compare, rows, options, note=_note)
        intervals = compare_evaluations(evaluation, other, rows, resamples=resamples, seed=seed)
    if predictions is not None:
        _write_predictions(predictions, evaluation)
    if report is not None:
        from fastserve.evaluate.task_report import write_report

        write_report(report, evaluation, intervals)
    if json:
        document = evaluation.to_json()
        if other is not None:
            document["compare"] = {
                "model": str(compare),
                "metrics": other.scores.metrics,
                "difference": {name: interval.to_json() for name, interval in intervals.items()},
            }
        print_json(document)
    else:
        _print(evaluation, intervals)


def _read_rows(folder: Path, data: Path, limit: int | None, on_problem: Mapping[str, str]) -> list[Row]:
    from fastserve.data import ProblemLog, load_data
    from fastserve.errors import DataError
    from fastserve.evaluate.task.table import task_of_folder

    with printed_problems() as report_problem:
        log = ProblemLog(on_problem, sink=report_problem, raises_at_once=False)
        rows = list(load_data(data, task_of_folder(folder).name, log=log))[:limit]
        log.raise_fatal()
    if not rows:
        raise DataError(f"{data} has no rows", hint="give a file with rows")
    return rows


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _write_predictions(path: Path, evaluation: Evaluation) -> None:
    import json

    with path.open("w", encoding="utf-8") as file:
        for prediction in evaluation.predictions:
            file.write(
                json.dumps(prediction, ensure_ascii=False, default=lambda array: array.tolist()) + "\n"
            )


def _print_probes(report: ProbeReport) -> None:
    print()
    rows = [
        [
            swap.name,
            f"{swap.gap:.4f}",
            swap.label,
            f"{swap.groups[0]} over {swap.groups[1]}",
            f"{swap.share_changed:.3f}",
        ]
        for swap in report.swaps
    ]
    print_table(["swap", "gap", "label", "groups", "templates whose label changes"], rows)
    if (negation := report.negation) is not None:
        print(
            f"negation: the label changes in {negation.share_changed:.0%} of {negation.num_pairs} pairs, "
            f"probabilities by {negation.mean_shift:.3f}"
        )


def _print(evaluation: Evaluation, intervals: Mapping[str, Interval]) -> None:
    scores, speed = evaluation.scores, evaluation.speed
    if intervals:
        rows = [
            [
                name,
                f"{value:.4f}",
                f"{i.value:+.4f}",
                f"{i.low:+.4f} to {i.high:+.4f}",
                f"{i.share_above:.3f}",
            ]
            for name, value in sorted(scores.metrics.items())
            if (i := intervals.get(name)) is not None
        ]
        print_table(["metric", "value", "more than the other", "95 % interval", "how often better"], rows)
    else:
        print_table(["metric", "value"], [[n, f"{v:.4f}"] for n, v in sorted(scores.metrics.items())])
    if scores.by_label:
        print()
        rows = [
            [label, f"{f.precision:.3f}", f"{f.recall:.3f}", f"{f.f1:.3f}", str(f.support)]
            for label, f in scores.by_label.items()
        ]
        print_table(["label", "precision", "recall", "f1", "support"], rows)
    if evaluation.probes is not None:
        _print_probes(evaluation.probes)
    print()
    print(
        f"{evaluation.num_rows} rows, computed by {_BACKENDS[evaluation.backend]}: "
        f"{speed.rows_per_second:.1f} rows/s together; a row alone takes {speed.latency_ms_median:.1f} ms "
        f"(95th percentile {speed.latency_ms_p95:.1f} ms)"
    )
    if (energy := evaluation.energy) is not None:
        joules = f"{energy.joules_per_row:.3g} J a row, {energy.joules_per_token:.3g} J a token"
        print(f"the machine consumed {joules}")
