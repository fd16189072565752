"""Simulates the policies where they differ most, and writes docs/scheduling.md's tables from the results."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from performance_table import CHECKOUT, insert, to_markdown

RESULTS = CHECKOUT / "bench" / "results" / "scheduling"
DOCUMENT = CHECKOUT / "docs" / "scheduling.md"
POLICIES = "fcfs,sjf,mlfq,mlfq-published"

# By the name of the results: a heading, and the options of `fastserve bench schedule`.
RUNS: Mapping[str, tuple[str, Sequence[str]]] = {
    "short_chat_a100": (
        "Short chat, load 1.1, `a100`, 2,500 requests a seed",
        ["--trace", "short-chat", "--cost", "a100", "--requests", "2500"],
    ),
    "short_chat_cpu": (
        "Short chat, load 1.1, `cpu`, 2,000 requests a seed",
        ["--trace", "short-chat", "--cost", "cpu", "--requests", "2000"],
    ),
    "pressure_a100": (
        "Mixed under memory pressure (60,000 KV tokens), load 1.1, `a100`, 1,500 requests a seed",
        ["--trace", "mixed", "--cost", "a100", "--requests", "1500", "--kv-tokens", "60000"],
    ),
    "pressure_cpu": (
        "Mixed under memory pressure (40,000 KV tokens), load 1.1, `cpu`, 800 requests a seed",
        ["--trace", "mixed", "--cost", "cpu", "--requests", "800", "--kv-tokens", "40000"],
    ),
}
COLUMNS = (
    ("TTFT mean", "ttft_mean_seconds"),
    ("end to end mean", "e2e_mean_seconds"),
    ("end to end p99", "e2e_p99_seconds"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", nargs="*", metavar="NAME", help="simulate these first; without names, all")
    parser.add_argument("--check", action="store_true", help="exit code 1 if the tables are stale")
    arguments = parser.parse_args()
    if arguments.run is not None:
        for name in arguments.run or RUNS:
            simulate(name)
    text = DOCUMENT.read_text(encoding="utf-8")
    updated = insert(text, {"scheduling": tables()})
    if arguments.check and updated != text:
        sys.exit("the tables differ from the results; run python bench/schedule_table.py")
    DOCUMENT.write_text(updated, encoding="utf-8")


def simulate(name: str) -> None:
    options = [*RUNS[name][1], "--policy", POLICIES, "--load", "1.1", "--seeds", "3", "--json"]
    command = [sys.executable, "-m", "fastserve.cli.main", "bench", "schedule", *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(done.stdout, encoding="utf-8")


def tables() -> str:
    paths = {name: RESULTS / f"{name}.json" for name in RUNS}
    parts = [
        f"**{RUNS[name][0]}**\n\n{table(json.loads(path.read_text(encoding='utf-8'))['rows'])}"
        for name, path in paths.items()
        if path.exists()
    ]
    return "\n\n".join(parts)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Seconds of the first policy, which the others' ratios of sums over all seeds are to."""
    by_policy: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_policy[row["policy"]].append(row)
    first = next(iter(by_policy.values()))
    cells = []
    for policy, runs in by_policy.items():
        values = [_value(runs, first, key) for _, key in COLUMNS]
        gap = mean(run["gap_p99_seconds"] for run in runs)
        evictions = [run["evictions_per_request"] for run in runs]
        goodput = mean(run["goodput_per_second"] for run in runs) / mean(
            run["goodput_per_second"] for run in first
        )
        spread = f"{min(evictions):.2f} to {max(evictions):.2f}" if max(evictions) else "0"
        cells.append([f"`{policy}`", *values, f"{gap:.2f} s", spread, f"{goodput:.2f}×"])
    header = [
        "policy",
        *(name for name, _ in COLUMNS),
        "longest gap p99",
        "evictions a request",
        "good requests",
    ]
    return to_markdown(header, cells)


def _value(runs: Sequence[Mapping[str, Any]], first: Sequence[Mapping[str, Any]], key: str) -> str:
    total, reference = mean(run[key] for run in runs), mean(run[key] for run in first)
    if runs is first:
        return f"{total:.2f} s"
    ratios = [run[key] / other[key] for run, other in zip(runs, first, strict=True)]
    return f"{total / reference:.2f}× [{min(ratios):.2f}, {max(ratios):.2f}]"


if __name__ == "__main__":
    main()
