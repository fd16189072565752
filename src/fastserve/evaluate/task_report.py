"""An evaluation as a folder to look at: a page with all figures, the confusion matrix, the reliability
diagram."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastserve.evaluate.bootstrap import Interval
from fastserve.evaluate.plot import check_plot
from fastserve.evaluate.task.task import Scores
from fastserve.evaluate.task_evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_CELLS_WITH_NUMBERS = 12  # labels of a confusion matrix up to which its counts can be read


def write_report(
    folder: Path, evaluation: Evaluation, intervals: Mapping[str, Interval] | None = None
) -> list[Path]:
    """Write `report.html`, `report.json`, and, where the task has them, `confusion.png` and
    `reliability.png`.

    `intervals` are of a comparison with another model, by metric. The folder is made.

    Raises:
        UnsupportedError: matplotlib is not installed.
        OSError: the folder cannot be written.
    """
    check_plot(folder)
    scores = evaluation.scores
    pictures = {}
    if scores.confusion is not None:
        pictures["confusion"] = _draw_confusion(scores)
    if scores.bins:
        pictures["reliability"] = _draw_reliability(scores)
    files = []
    for name, figure in pictures.items():
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=120, facecolor="white")
    document = evaluation.to_json()
    if intervals:
        document["compare"] = {name: interval.to_json() for name, interval in intervals.items()}
    files += [folder / "report.json", folder / "report.html"]
    files[-2].write_text(json.dumps(document, ensure_ascii=False, indent=2), encoding="utf-8")
    files[-1].write_text(_page(evaluation, list(pictures), intervals or {}), encoding="utf-8")
    return files


def _draw_confusion(scores: Scores) -> Figure:
    from matplotlib.figure import Figure

    assert scores.confusion is not None
    labels, counts = scores.labels, scores.confusion
    size = min(14.0, 3 + 0.35 * len(labels))
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="right", title="Share of each label's rows")
    ticks = np.arange(len(labels))
    axes.set_xticks(ticks, labels, rotation=90)
    axes.set_yticks(ticks, labels)
    if len(labels) <= _MOST_CELLS_WITH_NUMBERS:
        for row in range(len(labels)):
            for column in range(len(labels)):
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour)
    return figure


def _draw_reliability(scores: Scores) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#808080", linestyle="--", label="as it should be")
    x, y = [bin_.confidence for bin_ in scores.bins], [bin_.accuracy for bin_ in scores.bins]
    axes.plot(x, y, marker="o", color="#0072b2", label="this model")
    most = max(bin_.num_rows for bin_ in scores.bins)
    for bin_ in scores.bins:
        width = bin_.high - bin_.low
        axes.bar(bin_.low, 0.3 * bin_.num_rows / most, width, align="edge", color="#56b4e9", alpha=0.4)
    error = scores.metrics["calibration_error"]
    axes.set(xlabel="confidence", ylabel="accuracy", title=f"Calibration error {error:.3f} (bars: rows)")
    axes.legend(frameon=False)
    return figure


def _page(evaluation: Evaluation, pictures: Seq[str], intervals: Mapping[str, Interval]) -> str:
    scores, speed = evaluation.scores, evaluation.speed
    title = html.escape(f"{evaluation.folder.name}: {evaluation.task.name}")
    parts = [f"<h1>{title}</h1><p>{evaluation.num_rows} rows, computed by {evaluation.backend}: "]
    parts.append(
        f"{speed.rows_per_second:.1f} rows a second; one alone takes {speed.latency_ms_median:.1f} ms "
        f"(95th percentile {speed.latency_ms_p95:.1f} ms).</p>"
    )
    if (energy := evaluation.energy) is not None:
        parts.append(
            f"<p>The machine consumed {energy.joules:.3g} J, {energy.joules_per_row:.3g} J a row and "
            f"{energy.joules_per_token:.3g} J a token.</p>"
        )
    parts.append(_table(("metric", "value"), [(n, f"{v:.4f}") for n, v in sorted(scores.metrics.items())]))
    if intervals:
        rows = [
            (name, f"{i.value:+.4f}", f"{i.low:+.4f} to {i.high:+.4f}", f"{i.share_above:.3f}")
            for name, i in intervals.items()
        ]
        parts.append("<h2>More than the model it is compared with</h2>")
        parts.append(_table(("metric", "difference", "95 % interval", "how often better"), rows))
    if scores.by_label:
        of_labels = [
            (label, f"{f.precision:.3f}", f"{f.recall:.3f}", f"{f.f1:.3f}", str(f.support))
            for label, f in scores.by_label.items()
        ]
        parts.append(_table(("label", "precision", "recall", "F1", "support"), of_labels))
    parts += [f'<img src="{name}.png" alt="{name}">' for name in pictures]
    style = (
        "body{font-family:sans-serif;max-width:60rem;margin:2rem auto;color:#222;background:#fff}"
        "td,th{padding:.2rem .8rem;text-align:left;border-bottom:1px solid #ddd}img{max-width:100%}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{style}</style>{''.join(parts)}</html>"
    )


def _table(header: Seq[str], rows: Seq[Seq[str]]) -> str:
    def line(cells: Seq[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    return f"<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
