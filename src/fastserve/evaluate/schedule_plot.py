"""Charts of simulated policies: latency against load, a line for each policy."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np

from fastserve.evaluate.plot import Chart, plot_charts
from fastserve.evaluate.schedule_sweep import Run

# By file: what is plotted, and its axis.
PLOTS = {
    "ttft_mean": ("ttft_mean_seconds", "mean time to first token, seconds"),
    "e2e_mean": ("e2e_mean_seconds", "mean end-to-end latency, seconds"),
    "e2e_p99": ("e2e_p99_seconds", "p99 of end-to-end latency, seconds"),
    "gap_p99": ("gap_p99_seconds", "p99 of the longest gap between tokens, seconds"),
    "goodput": ("goodput_per_second", "requests per second that keep the objective"),
}


def plot_runs(runs: Seq[Run], folder: Path, *, title: str) -> list[Path]:
    """Write PLOTS into a folder, which is made; a point is the mean over seeds. Returns the files.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    policies = list(dict.fromkeys(run.policy for run in runs))
    loads = list(dict.fromkeys(run.load for run in runs))
    charts = {
        name: Chart(
            label,
            {
                policy: [
                    (
                        load,
                        float(
                            np.mean([r.figures[figure] for r in runs if (r.policy, r.load) == (policy, load)])
                        ),
                    )
                    for load in loads
                ]
                for policy in policies
            },
            is_logarithmic=name != "goodput",
        )
        for name, (figure, label) in PLOTS.items()
    }
    return plot_charts(charts, folder, title=title, load_label="load (1.0 is the measured capacity)")
