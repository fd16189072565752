"""Size against quality of compressed models, those that none beats joined by a line: PNG, and a page."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

from fastserve.evaluate.plot import check_plot


@dataclass(frozen=True, slots=True)
class Point:
    """A model: its size, the change of its quality as a share, whether none beats it, and its figures for the
    table by name."""

    name: str
    size_bytes: float
    change: float
    is_on_front: bool
    is_chosen: bool
    figures: Mapping[str, str]


def plot_front(
    points: Seq[Point],
    folder: Path,
    *,
    title: str,
    most_bytes: float | None = None,
    least_change: float | None = None,
) -> list[Path]:
    """Write `front.png` and `front.html` into a folder, which is made. Limits are drawn as lines.

    Raises:
        UnsupportedError: matplotlib is not installed.
        OSError: the folder cannot be written.
    """
    check_plot(folder)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.5), layout="constrained")
    axes = figure.subplots()
    best = sorted((point for point in points if point.is_on_front), key=lambda point: point.size_bytes)
    axes.plot(
        [point.size_bytes / 1e6 for point in best],
        [100 * point.change for point in best],
        color="#0072b2",
        marker="o",
        label="none is smaller and better",
    )
    beaten = [point for point in points if not point.is_on_front]
    axes.scatter(
        [point.size_bytes / 1e6 for point in beaten],
        [100 * point.change for point in beaten],
        color="#808080",
        marker="x",
        label="beaten",
    )
    for point in points:
        if point.is_chosen:
            axes.scatter(
                [point.size_bytes / 1e6],
                [100 * point.change],
                s=160,
                facecolors="none",
                edgecolors="#d55e00",
                label="chosen",
            )
        axes.annotate(
            point.name,
            (point.size_bytes / 1e6, 100 * point.change),
            xytext=(4, -10),
            textcoords="offset points",
            fontsize=7,
        )
    if most_bytes is not None:
        axes.axvline(most_bytes / 1e6, color="#d55e00", linestyle="--", linewidth=1)
    if least_change is not None:
        axes.axhline(100 * least_change, color="#d55e00", linestyle="--", linewidth=1)
    axes.set(xlabel="weights on the disk, MB", ylabel="change of quality, %", title=title)
    axes.margins(x=0.12, y=0.08)  # names stand to the right of their points, and below
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    files = [folder / "front.png", folder / "front.html"]
    figure.savefig(files[0], dpi=120, facecolor="white", metadata={"Software": None})
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    files[1].write_text(_page(points, drawn.getvalue(), title), encoding="utf-8")
    return files


def _page(points: Seq[Point], picture: str, title: str) -> str:
    names = list(dict.fromkeys(name for point in points for name in point.figures))
    header = "".join(f"<th>{html.escape(name)}</th>" for name in ("model", *names))
    rows = []
    for point in sorted(points, key=lambda point: point.size_bytes):
        cells = [point.name, *(point.figures.get(name, "") for name in names)]
        kind = " class=chosen" if point.is_chosen else ""
        rows.append(f"<tr{kind}>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
    style = (
        "body{font-family:sans-serif;max-width:60rem;margin:2rem auto;color:#222;background:#fff}"
        "td,th{padding:.2rem .8rem;text-align:left;border-bottom:1px solid #ddd}svg{width:100%;height:auto}"
        ".chosen{font-weight:bold}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style><h1>{html.escape(title)}</h1>{picture[picture.index('<svg') :]}"
        f"<table><tr>{header}</tr>{''.join(rows)}</table></html>\n"
    )
