"""Loss and metrics of a training run over its steps, as PNG and as one page of HTML that holds all of
them."""

from __future__ import annotations

import html
import io
import os
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path

from fastserve.evaluate.plot import Chart, check_plot, draw_chart
from fastserve.types import JsonObject

_FIGURES_OF_TIME = ("runtime", "samples_per_second", "steps_per_second")


def charts_of_log(log: Seq[JsonObject]) -> dict[str, Chart]:
    """Charts by name: `loss` of training and dev rows, `metrics` of dev rows, `learning_rate`."""
    loss = {"train": _series(log, "loss"), "dev": _series(log, "eval_loss")}
    names = sorted({name for entry in log for name in entry if name.startswith("eval_")} - {"eval_loss"})
    metrics = {
        name.removeprefix("eval_"): _series(log, name)
        for name in names
        if not name.endswith(_FIGURES_OF_TIME)
    }
    charts = {
        "loss": Chart("loss", _drawn(loss), is_logarithmic=False),
        "metrics": Chart("metrics of the dev rows", _drawn(metrics), is_logarithmic=False),
        "learning_rate": Chart(
            "learning rate", _drawn({"learning rate": _series(log, "learning_rate")}), is_logarithmic=False
        ),
    }
    return {name: chart for name, chart in charts.items() if chart.lines}


def plot_training(log: Seq[JsonObject], folder: Path, *, title: str, is_live: bool = False) -> list[Path]:
    """Write `loss.png`, `metrics.png`, `learning_rate.png` and `curves.html` into a folder, which is made.

    The page of a run that `is_live` loads itself anew every ten seconds. Each file is replaced at once.

    Raises:
        UnsupportedError: matplotlib is not installed.
        OSError: the folder cannot be written.
    """
    check_plot(folder)
    files, pictures = [], []
    for name, chart in charts_of_log(log).items():
        figure = draw_chart(chart, title=title, load_label="step")
        files.append(folder / f"{name}.png")
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120, facecolor="white", metadata={"Software": None})
        _replace(files[-1], picture.getvalue())
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
        pictures.append(drawn.getvalue()[drawn.getvalue().index("<svg") :])
    refresh = '<meta http-equiv="refresh" content="10">' if is_live else ""
    heading = html.escape(title)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8">{refresh}<title>{heading}</title>'
        "<style>body{font-family:sans-serif;background:#fff;color:#222;max-width:60rem;margin:2rem auto}"
        f"svg{{width:100%;height:auto}}</style><h1>{heading}</h1>{''.join(pictures)}</html>"
    )
    files.append(folder / "curves.html")
    _replace(files[-1], page.encode())
    return files


def _series(log: Seq[JsonObject], name: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[name]) for entry in log if name in entry and "step" in entry]


def _drawn(lines: Mapping[str, list[tuple[float, float]]]) -> dict[str, list[tuple[float, float]]]:
    return {name: points for name, points in lines.items() if points}


def _replace(path: Path, content: bytes) -> None:
    written = path.with_name(f"{path.name}.part")
    written.write_bytes(content)
    os.replace(written, path)
