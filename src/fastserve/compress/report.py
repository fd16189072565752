"""The report of a compression: one JSON document, and what people read of it as lines, a card and a page."""

from __future__ import annotations

import html
import json
from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path

from fastserve.compress.artifact import ArtifactSizes
from fastserve.compress.budget import Verdict
from fastserve.compress.quality import Quality
from fastserve.compress.speed import Speed
from fastserve.compress.step import LayerError
from fastserve.types import JsonObject

REPORT_FOLDER = "compression"  # in the artifact

_LABELS = {
    "decode_ms": "a token after the first, ms",
    "prefill_ms": "a prompt up to its first token, ms",
    "sentence_ms": "a text alone, ms",
    "sentences_per_second": "texts a second, 32 at once",
    "memory_bytes": "most memory of the process, MB",
}


def build_report(
    *,
    model: str,
    recipe: JsonObject,
    source_bytes: int,
    sizes: ArtifactSizes,
    layers: Seq[LayerError],
    notes: Seq[str],
    quality: Quality | None,
    speeds: Mapping[str, Speed],
    seconds: float,
) -> JsonObject:
    """The document.

    Args:
        source_bytes: of the source's weights on the disk.
        layers: what steps did to matrices.
        speeds: `before` and `after`; empty where nothing was measured.
    """
    errors: dict[str, list[JsonObject]] = defaultdict(list)
    for layer in layers:
        errors[layer.name].append(
            {"step": layer.step, "relative_error": layer.relative_error, "on": layer.on}
        )
    tensors = [
        {
            "name": name,
            "stored": size.stored,
            "bytes": size.num_bytes,
            "bits_per_element": 8 * size.num_bytes / max(size.num_elements, 1),
            "sparsity": size.sparsity,
            "errors": errors.get(name, []),
        }
        for name, size in sizes.tensors.items()
        if name in errors or size.num_zeros is not None
    ]
    return {
        "model": model,
        "recipe": recipe,
        "size": {
            "before_bytes": source_bytes,
            "after_bytes": sizes.weight_bytes,
            "share": sizes.weight_bytes / source_bytes,
            "expanded_bytes": sizes.expanded_bytes,
            "form": sizes.form,
        },
        "quality": None if quality is None else quality.to_json(),
        "speed": {name: speed.to_json() for name, speed in speeds.items()},
        "layers": tensors,
        "notes": list(notes),
        "seconds": seconds,
    }


def measured_values(report: JsonObject) -> dict[str, float]:
    """What budgets are held to, by name, as far as the report has it."""
    size = report["size"]["after_bytes"]
    if "archive" in report:
        size = report["archive"]["file_bytes"]
    values = {"size": size, "source_size": report["size"]["before_bytes"]}
    if (quality := report["quality"]) is not None:
        values["quality"] = quality["change"]
        apart = quality["apart"]
        names = {"kl": "mean_kl", "agreement": "top1_agreement"}
        values |= {name: apart[own]["value"] for name, own in names.items() if own in apart}
    after = report["speed"].get("after", {})
    names = {"decode": "decode_ms", "prefill": "prefill_ms", "latency": "sentence_ms"}
    values |= {name: after[own] for name, own in {**names, "memory": "memory_bytes"}.items() if own in after}
    return {name: float(value) for name, value in values.items()}


def with_budget(report: JsonObject, text: str, verdicts: Seq[Verdict]) -> JsonObject:
    """The document with what became of a budget."""
    return {
        **report,
        "budget": {
            "text": text,
            "is_met": all(verdict.is_met for verdict in verdicts),
            "limits": [{**verdict.to_json(), "text": verdict.text} for verdict in verdicts],
        },
    }


def report_rows(report: JsonObject) -> list[tuple[str, str, str, str]]:
    """The figures: what, before, after, and the change with its 95 % interval."""
    size = report["size"]
    rows = [
        (
            "weights on the disk, MB",
            f"{size['before_bytes'] / 1e6:.2f}",
            f"{size['after_bytes'] / 1e6:.2f}",
            f"{size['share']:.1%} of it",
        )
    ]
    if size["expanded_bytes"] != size["after_bytes"]:
        rows.append(("as used where dense, MB", "", f"{size['expanded_bytes'] / 1e6:.2f}", ""))
    if (archive := report.get("archive")) is not None:
        bound = archive["file_bytes"] / max(archive["entropy_bytes"], 1) - 1
        rows.append(
            (
                "archive, MB",
                "",
                f"{archive['file_bytes'] / 1e6:.2f}",
                f"{archive['file_bytes'] / size['before_bytes']:.1%} of it, {bound:+.1%} of its entropy",
            )
        )
    quality = report["quality"]
    for name, change in (quality or {"metrics": {}})["metrics"].items():
        before, after, difference = (change[key] for key in ("before", "after", "difference"))
        is_ratio = name == "perplexity"
        rows.append(
            (
                name,
                f"{before['value']:.4f}",
                f"{after['value']:.4f} ({after['low']:.4f} to {after['high']:.4f})",
                _interval(difference, is_percent=is_ratio, is_signed=True),
            )
        )
    for name, interval in (quality or {"apart": {}})["apart"].items():
        rows.append((name, "", _interval(interval, is_percent="kl" not in name), ""))
    before, after = (report["speed"].get(name, {}) for name in ("before", "after"))
    for name, label in _LABELS.items():
        if name in after and name in before:
            scale = 1e-6 if name == "memory_bytes" else 1.0
            was, is_ = before[name] * scale, after[name] * scale
            rows.append((label, f"{was:.3g}", f"{is_:.3g}", f"{is_ / was:.2f} of it" if was else ""))
    return rows


def search_rows(report: JsonObject) -> list[list[str]]:
    """Of a search, what was measured: name, size, change of quality, time of a token or text, and what it
    is."""
    rows = []
    for trial in sorted(report.get("search", []), key=lambda trial: trial["size"]):
        time_ms = trial.get("decode", trial.get("latency"))
        what = [
            *(["chosen"] if trial["is_chosen"] else []),
            *(["keeps the budget"] if trial["is_met"] else []),
            *(["none is smaller and better"] if trial["is_on_front"] else []),
        ]
        rows.append(
            [
                trial["name"],
                f"{trial['size'] / 1e6:.2f}",
                f"{trial['quality']:+.2%}",
                "" if time_ms is None else f"{time_ms:.3g}",
                ", ".join(what),
            ]
        )
    return rows


SEARCH_HEADER = ("model", "MB", "quality", "ms", "")


def report_lines(report: JsonObject) -> list[str]:
    """What is said beside the table: budget, notes, the matrices that lost most."""
    lines = []
    budget = report.get("budget")
    if budget is not None:
        lines += [("met: " if limit["is_met"] else "NOT met: ") + limit["text"] for limit in budget["limits"]]
    lines += [f"note: {note}" for note in report["notes"]]
    worst = sorted(report["layers"], key=lambda layer: -_last_error(layer))[:3]
    lines += [
        f"largest error: {layer['name']}, {_last_error(layer):.2%} of its {layer['errors'][-1]['on']}"
        for layer in worst
        if layer["errors"]
    ]
    return lines


def report_card(report: JsonObject, *, name: str) -> str:
    """Markdown, as model hubs show it."""
    quality = report["quality"]
    judged = "" if quality is None else f" Judged by {quality['judged_by']}, natively."
    lines = [f"# {name}", "", f"Made by `fastserve compress` from `{report['model']}`.{judged}", ""]
    lines += _markdown(("", "before", "after", "change (95 % interval)"), report_rows(report))
    lines += [f"- {line}" for line in report_lines(report)] + [""]
    if rows := search_rows(report):
        lines += ["## What was searched", "", *_markdown(SEARCH_HEADER, rows)]
        lines += [f"![size against quality]({REPORT_FOLDER}/front.png)", ""]
    lines += ["## Recipe", "", "```json", json.dumps(report["recipe"], indent=2), "```", ""]
    return "\n".join(lines)


def write_report(report: JsonObject, artifact: Path, *, name: str) -> None:
    """Write `README.md`, and `report.json` and `report.html` into `compression/`, of an artifact's folder."""
    folder = artifact / REPORT_FOLDER
    folder.mkdir(exist_ok=True)
    (artifact / "README.md").write_text(report_card(report, name=name), encoding="utf-8")
    text = json.dumps(report, ensure_ascii=False, indent=2)
    (folder / "report.json").write_text(f"{text}\n", encoding="utf-8")
    (folder / "report.html").write_text(_page(report, name), encoding="utf-8")


def _page(report: JsonObject, name: str) -> str:
    quality = report["quality"]
    judged = "" if quality is None else f" Judged by {quality['judged_by']}, by the native runtime."
    title = html.escape(name)
    parts = [
        f"<h1>{title}</h1><p>Compressed from {html.escape(report['model'])}.{html.escape(judged)}</p>",
        _table(("", "before", "after", "change (95 % interval)"), report_rows(report)),
    ]
    if lines := report_lines(report):
        parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>")
    if found := search_rows(report):
        parts.append("<h2>What was searched</h2>")
        parts.append(_table(SEARCH_HEADER, found))
        parts.append('<img src="front.png" alt="size against quality" style="max-width:100%">')
    rows = [
        (
            layer["name"],
            layer["stored"],
            f"{layer['bits_per_element']:.2f}",
            "" if layer["sparsity"] is None else f"{layer['sparsity']:.1%}",
            ", ".join(f"{e['step']} {e['relative_error']:.3%} of {e['on']}" for e in layer["errors"]),
        )
        for layer in report["layers"]
    ]
    parts.append("<h2>Matrices</h2>")
    parts.append(_table(("matrix", "stored as", "bits an element", "zeros", "error"), rows))
    recipe = html.escape(json.dumps(report["recipe"], indent=2))
    parts.append(f"<h2>Recipe</h2><pre>{recipe}</pre>")
    style = (
        "body{font-family:sans-serif;max-width:60rem;margin:2rem auto;color:#222;background:#fff}"
        "td,th{padding:.2rem .8rem;text-align:left;border-bottom:1px solid #ddd}pre{overflow:auto}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{style}</style>{''.join(parts)}</html>\n"
    )


def _interval(interval: JsonObject, *, is_percent: bool, is_signed: bool = False) -> str:
    sign = "+" if is_signed else ""
    form = f"{sign}.2%" if is_percent else f"{sign}.4f"
    value, low, high = (format(interval[key], form) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _last_error(layer: JsonObject) -> float:
    return layer["errors"][-1]["relative_error"] if layer["errors"] else 0.0


def _markdown(header: Seq[str], rows: Seq[Seq[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines] + [""]


def _table(header: Seq[str], rows: Seq[Seq[str]]) -> str:
    def line(cells: Seq[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    return f"<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
