"""What a hyper-parameter search found: the metric of its trials, and how much each option matters."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path

from fastserve.evaluate.plot import Chart, check_plot, draw_chart


def plot_search(
    trials: Seq[tuple[int, float]], importance: Mapping[str, float], folder: Path, *, metric: str
) -> list[Path]:
    """Write `trials.png`, points (trial, metric), and `importance.png`, where there is any, into a folder.

    Raises:
        UnsupportedError: matplotlib is not installed.
        OSError: the folder cannot be written.
    """
    check_plot(folder)
    from matplotlib.figure import Figure

    chart = Chart(metric, {"trials": trials}, is_logarithmic=False)
    figures = {"trials": draw_chart(chart, title="Trials", load_label="trial")}
    if importance:
        figure = Figure(figsize=(6.4, 1 + 0.4 * len(importance)), layout="constrained")
        axes = figure.subplots()
        names = sorted(importance, key=lambda name: importance[name])
        axes.barh(names, [importance[name] for name in names], color="#0072b2")
        axes.set(xlabel=f"share of what changes {metric}", title="Importance of options")
        figures["importance"] = figure
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=120, facecolor="white")
    return [folder / f"{name}.png" for name in figures]
