"""Latency against load, a line for each policy, as SVG that is read on light and on dark pages."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np

from fastserve.errors import UnsupportedError
from fastserve.evaluate.schedule_sweep import Run

# By file: what is plotted, and its axis.
PLOTS = {
    "ttft_mean": ("ttft_mean_seconds", "mean time to first token, seconds"),
    "e2e_mean": ("e2e_mean_seconds", "mean end-to-end latency, seconds"),
    "e2e_p99": ("e2e_p99_seconds", "p99 of end-to-end latency, seconds"),
    "gap_p99": ("gap_p99_seconds", "p99 of the longest gap between tokens, seconds"),
    "goodput": ("goodput_per_second", "requests per second that keep the objective"),
}
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


def plot_runs(runs: Seq[Run], folder: Path, *, title: str) -> list[Path]:
    """Write PLOTS into a folder, which is made; a point is the mean over seeds. Returns the files.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            f"plots need matplotlib: {error}", hint="pip install 'fastserve-llm[bench]'"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    policies = list(dict.fromkeys(run.policy for run in runs))
    loads = list(dict.fromkeys(run.load for run in runs))
    files = []
    style: dict[Any, Any] = {"svg.hashsalt": "fastserve", "svg.fonttype": "none"}
    style |= dict.fromkeys(("text.color", "xtick.color", "ytick.color", "grid.color"), _GREY)
    style |= dict.fromkeys(("axes.edgecolor", "axes.labelcolor"), _GREY)
    with rc_context(style):
        for name, (figure_name, label) in PLOTS.items():
            figure = Figure(figsize=(6.4, 4.0), layout="constrained")
            axes = figure.subplots()
            for index, policy in enumerate(policies):
                means = [
                    np.mean([r.figures[figure_name] for r in runs if (r.policy, r.load) == (policy, load)])
                    for load in loads
                ]
                colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
                axes.plot(loads, means, label=policy, color=colour, marker=marker)
            if name != "goodput":
                axes.set_yscale("log")
            axes.set(xlabel="load (1.0 is the measured capacity)", ylabel=label, title=title)
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
            files.append(folder / f"{name}.svg")
            figure.savefig(files[-1], transparent=True, metadata={"Date": None})
    return files
