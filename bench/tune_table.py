"""Writes the tables of docs/guides/tune.md from the results in `results/tune/`."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from performance_table import insert

CHECKOUT = Path(__file__).resolve().parent.parent
GUIDE = CHECKOUT / "docs" / "guides" / "tune.md"
RESULTS = CHECKOUT / "bench" / "results" / "tune"

PAIRS = {
    "sms": "SMS spam",
    "polarity": "sentence polarity",
    "banking77": "banking77, 77 intents",
    "wnut17": "WNUT-17, entities",
    "semeval": "SemEval-2010 task 8, relations",
    "subjects": "CSL, subjects of Chinese titles",
    "xquad": "XQuAD, English answers",
    "cmrc": "CMRC 2018, Chinese answers",
}
ORDERS = {"": "", "-own-order": ", rows in an order of its own"}
METRICS = {
    ("text-classification", "accuracy"): "accuracy",
    ("token-classification", "f1"): "F1 of entities",
    ("relation-extraction", "f1"): "macro F1",
    ("question-answering", "f1"): "F1 of words",
}
CASES = {
    "generation-translation-de": "English to German, SmolLM2 with LoRA",
    "generation-translation-zh": "English to Chinese, SmolLM2 with LoRA",
    "generation-summarization": "abstracts to one sentence (SciTLDR), SmolLM2 with LoRA",
    "generation-t5": "English to Chinese, a tiny T5 from scratch",
}
OVERLAPS = {"chrf": "chrF", "rougeL": "ROUGE-L"}


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Documents by the names of their files."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}


def pair_table(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each set: both sides' means over seeds in percent, and what lies between them."""
    lines = [
        (
            "set",
            "rows",
            "metric",
            "seeds",
            "script",
            "fastserve",
            "difference",
            "rows alike",
            "CPU s",
            "command",
        )
    ]
    for name, title in PAIRS.items():
        for suffix, remark in ORDERS.items():
            if (document := documents.get(f"{name}{suffix}")) is not None:
                lines.append(_pair_line(document, f"{title}{remark}"))
    return _markdown(lines)


def _pair_line(document: Mapping[str, Any], title: str) -> tuple[str, ...]:
    settings, metric = document["settings"], document["metric"]
    values = {
        side: [100 * run["metrics"][metric] for run in document["runs"] if run["side"] == side]
        for side in ("script", "fastserve")
    }
    script, ours = values["script"], values["fastserve"]
    alike = statistics.mean(run["share_alike"] for run in document["runs"] if "share_alike" in run)
    seconds = [
        statistics.mean(run["cpu_seconds"] for run in document["runs"] if run["side"] == side)
        for side in ("script", "fastserve")
    ]
    order = "" if settings["order"] == "same" else " --order own"
    return (
        title,
        f"{settings['num_train']:,} x {settings['epochs']}, {settings['num_dev']:,}",
        METRICS[document["task"], metric],
        str(len(script)),
        _mean(script),
        _mean(ours),
        f"{statistics.mean(ours) - statistics.mean(script):+.2f}",
        f"{100 * alike:.1f} %",
        " / ".join(f"{value:.0f}" for value in seconds),
        f"`--sets {document['set']}{order}`",
    )


def _mean(values: Sequence[float]) -> str:
    """The mean, and how far seeds lie apart: `98.3 (97.9 to 98.6)`."""
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def generation_table(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each case: what a copy scores, what the tuned model does, and the interval of what is
    between."""
    lines = [("what", "rows", "metric", "copy", "tuned", "difference (95 %)", "CPU s", "command")]
    for name, title in CASES.items():
        if (document := documents.get(name)) is None:
            continue
        metric, gain = document["metric"], document["difference"]
        scale = 100 if metric.startswith("rouge") else 1
        copy, tuned = (scale * document["scores"][what][metric] for what in (document["best_copy"], "tuned"))
        epochs = document["options"]["epochs"]
        lines.append(
            (
                title,
                f"{document['num_train']:,} x {epochs}, {document['num_dev']}",
                OVERLAPS[metric],
                f"{copy:.1f} ({document['best_copy']})",
                f"{tuned:.1f}",
                f"{scale * gain['value']:+.1f} ({scale * gain['low']:+.1f} to {scale * gain['high']:+.1f})",
                f"{document['cpu_seconds']:.0f}",
                f"`--cases {name.removeprefix('generation-')}`",
            )
        )
    return _markdown(lines)


def _markdown(lines: Iterable[Sequence[str]]) -> str:
    header, *rows = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit code 1 if a table is stale"
    )
    is_checking = parser.parse_args().check
    documents = read_results(RESULTS)
    tables = {"tune-pairs": pair_table(documents), "tune-generation": generation_table(documents)}
    text = GUIDE.read_text(encoding="utf-8")
    updated = insert(text, tables)
    if not is_checking:
        GUIDE.write_text(updated, encoding="utf-8")
    elif updated != text:
        sys.exit("the tables differ from the results; run python bench/tune_table.py")


if __name__ == "__main__":
    main()
