"""Charts of servers under load: what clients see against the rate of requests, a line for each server."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from fastserve.evaluate.plot import Chart, plot_charts

# By file: what is plotted, and its axis.
PLOTS = {
    "ttft_mean": ("ttft_mean_seconds", "mean time to first token, seconds"),
    "ttft_p99": ("ttft_p99_seconds", "p99 of time to first token, seconds"),
    "normalized_mean": ("normalized_mean_seconds", "mean end-to-end latency per token, seconds"),
    "e2e_mean": ("e2e_mean_seconds", "mean end-to-end latency, seconds"),
    "itl_p99": ("itl_p99_seconds", "p99 of time between tokens, seconds"),
    "goodput": ("goodput_per_second", "requests per second that keep the objective"),
}


def plot_rows(rows: Mapping[str, Seq[Mapping[str, Any]]], folder: Path, *, title: str) -> list[Path]:
    """Write PLOTS into a folder, which is made. Returns the files.

    Args:
        rows: of each server, as `LoadRow.to_json` gives them. Those of one kind of load are drawn: at a rate,
            where there are any, or so many requests at once; those stopped early, or without any finished
            request, are left out.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    whole = {
        server: [row for row in of_server if row["num_finished"] and not row.get("was_stopped_early")]
        for server, of_server in rows.items()
    }
    has_rates = any(row["rate"] is not None for of_server in whole.values() for row in of_server)
    load, load_label = ("rate", "requests per second") if has_rates else ("concurrency", "requests at once")
    charts = {
        name: Chart(
            label,
            {
                server: sorted((row[load], row[figure]) for row in of_server if row[load] is not None)
                for server, of_server in whole.items()
            },
            is_logarithmic=name != "goodput",
        )
        for name, (figure, label) in PLOTS.items()
    }
    return plot_charts(charts, folder, title=title, load_label=load_label)
