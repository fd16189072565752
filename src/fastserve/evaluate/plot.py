"""Figures against load, a line for each series, as SVG that is read on light and on dark pages."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GREY = "#808080"  # has a contrast of 4 to white and of 5 to black
_COLOURS = (
    "#e69f00",
    "#56b4e9",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#0072b2",
    "#999933",
)  # Okabe and Ito, 2008
_MARKERS = "osD^vP*"

Lines = Mapping[str, Seq[tuple[float, float]]]
"""Points (load, figure) of each series, by its name."""


@dataclass(frozen=True, slots=True)
class Chart:
    """What one file shows. Latencies, which grow without bounds, have a logarithmic axis."""

    label: str
    lines: Lines
    is_logarithmic: bool = True


def plot_charts(charts: Mapping[str, Chart], folder: Path, *, title: str, load_label: str) -> list[Path]:
    """Write each chart into a folder, which is made, as NAME.svg. Returns the files.

    Raises:
        UnsupportedError: matplotlib is not installed.
        OSError: the folder cannot be written.
    """
    check_plot(folder)
    files = []
    for name, chart in charts.items():
        figure = draw_chart(chart, title=title, load_label=load_label)
        files.append(folder / f"{name}.svg")
        with _style():
            figure.savefig(files[-1], transparent=True, metadata={"Date": None})
    return files


def draw_chart(chart: Chart, *, title: str, load_label: str) -> Figure:
    """A chart as matplotlib's figure, to be saved in any format."""
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        for index, (series, points) in enumerate(chart.lines.items()):
            colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
            loads, values = [load for load, _ in points], [value for _, value in points]
            axes.plot(loads, values, label=series, color=colour, marker=marker)
        if chart.is_logarithmic:
            axes.set_yscale("log")
        axes.set(xlabel=load_label, ylabel=chart.label, title=title)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


def _style() -> AbstractContextManager[None]:
    from matplotlib import rc_context

    style: dict[Any, Any] = {"svg.hashsalt": "fastserve", "svg.fonttype": "none"}
    style |= dict.fromkeys(("text.color", "xtick.color", "ytick.color", "grid.color"), _GREY)
    style |= dict.fromkeys(("axes.edgecolor", "axes.labelcolor"), _GREY)
    return rc_context(style)


def check_plot(folder: Path) -> None:
    """See, before what is to be plotted is measured, that it can be: the folder is made. Raises as
    `plot_charts`."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"plots need matplotlib: {error}", hint="pip install 'fastserve-llm[bench]'"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
