"""Simulates the policies where they differ most, and writes docs/scheduling.md's tables from the results."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from performance_table import CHECKOUT, insert, to_markdown

RESULTS = CHECKOUT / "bench" / "results" / "scheduling"
DOCUMENT = CHECKOUT / "docs" / "scheduling.md"
SEEDS = "3"


@dataclass(frozen=True)
class Comparison:
    """Policies on one kind of traffic; `options` are those of `fastserve bench schedule`."""

    heading: str
    options: str
    policies: str

    @property
    def arguments(self) -> list[str]:
        return [
            "bench",
            "schedule",
            *self.options.split(),
            "--policy",
            self.policies,
            "--seeds",
            SEEDS,
            "--json",
        ]


PUBLISHED = "fcfs,sjf,mlfq,mlfq-published"
ALL = "fcfs,hrrn,gittins,mlfq,boost"
LIGHT = "fcfs,hrrn,boost"
CODE = "traces/azure2023/AzureLLMInferenceTrace_code.csv"
MOONCAKE = "traces/mooncake_fast25/synthetic_trace.jsonl"


def _compare(trace: str, cost: str, load: float, requests: int, policies: str, more: str = "") -> Comparison:
    name = {CODE: "Azure code", MOONCAKE: "Mooncake"}.get(trace, trace.replace("-", " ").capitalize())
    pressure = f" under memory pressure ({int(more.split()[-1]):,} KV tokens)" if more else ""
    return Comparison(
        f"{name}{pressure}, load {load:g}, `{cost}`, {requests:,} requests a seed",
        f"--trace {trace} --cost {cost} --load {load:g} --requests {requests} {more}",
        policies,
    )


# By the table of the document, then by the name of the results.
TABLES: Mapping[str, Mapping[str, Comparison]] = {
    "scheduling": {
        "short_chat_a100": _compare("short-chat", "a100", 1.1, 2500, PUBLISHED),
        "short_chat_cpu": _compare("short-chat", "cpu", 1.1, 2000, PUBLISHED),
        "pressure_a100": _compare("mixed", "a100", 1.1, 1500, PUBLISHED, "--kv-tokens 60000"),
        "pressure_cpu": _compare("mixed", "cpu", 1.1, 800, PUBLISHED, "--kv-tokens 40000"),
    },
    "boost": {
        "boost_sharegpt_a100": _compare("sharegpt", "a100", 1.08, 3000, ALL),
        "boost_sharegpt_cpu": _compare("sharegpt", "cpu", 1.08, 800, ALL),
        "boost_mixed_a100": _compare("mixed", "a100", 1.15, 3000, ALL),
        "boost_mixed_cpu": _compare("mixed", "cpu", 1.15, 800, ALL),
        "boost_code_a100": _compare(CODE, "a100", 1.0, 3000, ALL),
        "boost_code_cpu": _compare(CODE, "cpu", 1.0, 800, ALL),
        "boost_mooncake_a100": _compare(MOONCAKE, "a100", 1.05, 1500, ALL),
        "boost_mooncake_cpu": _compare(MOONCAKE, "cpu", 1.05, 300, ALL),
        "boost_short_chat_a100": _compare("short-chat", "a100", 1.0, 2500, ALL),
        "boost_short_chat_cpu": _compare("short-chat", "cpu", 1.0, 1500, ALL),
    },
    "boost_light": {
        "light_sharegpt_a100": _compare("sharegpt", "a100", 0.7, 1500, LIGHT),
        "light_sharegpt_cpu": _compare("sharegpt", "cpu", 0.7, 500, LIGHT),
        "light_mixed_a100": _compare("mixed", "a100", 0.7, 1500, LIGHT),
        "light_mixed_cpu": _compare("mixed", "cpu", 0.7, 500, LIGHT),
        "light_code_a100": _compare(CODE, "a100", 0.7, 1500, LIGHT),
        "light_code_cpu": _compare(CODE, "cpu", 0.7, 500, LIGHT),
        "light_mooncake_a100": _compare(MOONCAKE, "a100", 0.7, 1000, LIGHT),
        "light_mooncake_cpu": _compare(MOONCAKE, "cpu", 0.7, 300, LIGHT),
        "light_short_chat_a100": _compare("short-chat", "a100", 0.7, 2500, LIGHT),
        "light_short_chat_cpu": _compare("short-chat", "cpu", 0.7, 1500, LIGHT),
    },
}
COMPARISONS = {name: comparison for runs in TABLES.values() for name, comparison in runs.items()}


COLUMNS = (
    ("TTFT mean", "ttft_mean"),
    ("end to end mean", "e2e_mean"),
    ("end to end p99", "e2e_p99"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", nargs="*", metavar="NAME", help="simulate these first; without names, all")
    parser.add_argument("--check", action="store_true", help="exit code 1 if the tables are stale")
    arguments = parser.parse_args()
    if arguments.run is not None:
        for name in arguments.run or COMPARISONS:
            simulate(name)
    text = DOCUMENT.read_text(encoding="utf-8")
    updated = insert(text, {name: tables(comparisons) for name, comparisons in TABLES.items()})
    if arguments.check and updated != text:
        sys.exit("the tables differ from the results; run python bench/schedule_table.py")
    if arguments.check and missing():
        print(f"not simulated yet: {', '.join(missing())}; run python bench/schedule_table.py --run NAME")
    DOCUMENT.write_text(updated, encoding="utf-8")


def simulate(name: str) -> None:
    command = [sys.executable, "-m", "fastserve.cli.main", *COMPARISONS[name].arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(done.stdout, encoding="utf-8")


def missing() -> list[str]:
    """Names of comparisons without results."""
    return [name for name in COMPARISONS if not (RESULTS / f"{name}.json").exists()]


def tables(comparisons: Mapping[str, Comparison]) -> str:
    parts = []
    for name, comparison in comparisons.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            results = json.loads(path.read_text(encoding="utf-8"))
            parts.append(f"**{comparison.heading}**\n\n{table(results)}")
    return "\n\n".join(parts)


def table(results: Mapping[str, Any]) -> str:
    """Seconds of the first policy; of the others ratios to it, with the bounds of their bootstrap."""
    by_policy: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in results["rows"]:
        by_policy[row["policy"]].append(row)
    ratios = {entry["policy"]: entry for entry in results["ratios_to_first"]}
    first = next(iter(by_policy.values()))
    cells = []
    for policy, runs in by_policy.items():
        gap = mean(run["gap_p99_seconds"] for run in runs)
        evictions = mean(run["evictions_per_request"] for run in runs)
        good = mean(run["good_share"] for run in runs)
        cells.append(
            [
                f"`{policy}`",
                *(_value(first, ratios.get(policy), figure) for _, figure in COLUMNS),
                f"{gap:.2f} s",
                f"{evictions:.2f}" if evictions else "0",
                f"{good:.1%}",
            ]
        )
    header = [
        "policy",
        *(name for name, _ in COLUMNS),
        "longest gap p99",
        "evictions a request",
        "good requests",
    ]
    return to_markdown(header, cells)


def _value(first: Sequence[Mapping[str, Any]], ratios: Mapping[str, Any] | None, figure: str) -> str:
    if ratios is None:
        return f"{mean(run[f'{figure}_seconds'] for run in first):.2f} s"
    ratio = ratios[f"{figure}_ratio"]
    return f"{ratio['value']:.2f}× [{ratio['low']:.2f}, {ratio['high']:.2f}]"


if __name__ == "__main__":
    main()
