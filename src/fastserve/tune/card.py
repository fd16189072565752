"""The card of a training: what was made from what, how, and how good it is; Markdown, as model hubs show
it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict

from fastserve.evaluate.task.task import Row, Scores, Task
from fastserve.tune.options import TuneOptions
from fastserve.types import JsonObject

_MOST_LABELS = 30


def write_card(
    *,
    task: Task,
    options: TuneOptions,
    lineage: JsonObject,
    train: Seq[Row],
    scores: Scores | None,
    facts: Mapping[str, str],
) -> str:
    """The card's text; `scores` are of the dev rows, `facts` what else is to be said, by name."""
    lines = [f"# {task.name}", "", f"Made by `fastserve tune {task.name}` from `{lineage['model']}`.", ""]
    lines += _table(("fact", "value"), list(facts.items()))
    if scores is not None:
        lines += ["## Metrics of the dev rows", ""]
        lines += _table(("metric", "value"), [(k, f"{v:.4f}") for k, v in sorted(scores.metrics.items())])
        if scores.by_label:
            rows = [
                (label, f"{f.precision:.3f}", f"{f.recall:.3f}", f"{f.f1:.3f}", str(f.support))
                for label, f in list(scores.by_label.items())[:_MOST_LABELS]
            ]
            lines += _table(("label", "precision", "recall", "F1", "support"), rows)
            if len(scores.by_label) > _MOST_LABELS:
                lines += [f"(and {len(scores.by_label) - _MOST_LABELS} more labels)", ""]
    counts = Counter(str(row["label"]) for row in train if "label" in row and task.labels)
    if 1 < len(counts) <= _MOST_LABELS:
        lines += ["## Labels of the training rows", ""]
        lines += _table(("label", "rows"), [(label, str(n)) for label, n in counts.most_common()])
    lines += ["## Options", ""]
    lines += _table(("option", "value"), [(name, f"`{value}`") for name, value in asdict(options).items()])
    lines += ["## Lineage", ""]
    origin = {name: value for name, value in lineage.items() if name != "options"}  # they are above
    lines += _table(("of", "is"), [(name, f"`{value}`") for name, value in _flat(origin)])
    return "\n".join(lines)


def _table(header: Seq[str], rows: Seq[Seq[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines] + [""]


def _flat(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for name, value in values.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return found
