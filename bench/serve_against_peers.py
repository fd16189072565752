"""The highest rate of requests at which servers hold an SLO, side by side over HTTP: ours and those of peers.

All get the same requests: the mixed workload, its lengths scaled to the machine. While one is measured, the
others are stopped. `--rates` measures at given rates instead: that one server holds the SLO at a rate, and
another one does not at a part of it, bounds their ratio from below.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

from fastserve.evaluate.endpoint import EndpointOptions
from fastserve.evaluate.load_plot import plot_rows
from fastserve.evaluate.load_test import LoadOptions, LoadRow, LoadTest
from fastserve.evaluate.slo import Slo
from fastserve.evaluate.trace import data_folder
from report import make_parser, publish
from serving import RunningServer, add_server_options, measuring, run_servers, versions

TARGETS = {"llama.cpp": 3.0, "vllm": 1.4}
START_RATES = {"fastserve": 2.0, "llama.cpp": 0.5, "vllm": 1.4}  # where the search begins


def main() -> None:
    parser = make_parser(__doc__)
    add_server_options(parser)
    parser.add_argument("--trace", default="mixed")
    parser.add_argument("--data", type=Path, help="folder of traces and texts (also: FASTSERVE_TEST_DATA)")
    parser.add_argument("--slo", default="normalized_mean=0.15,ttft_p99=5")
    parser.add_argument("--length-scale", type=float, default=0.25)
    parser.add_argument("--max-prompt-tokens", type=int, default=2048)
    parser.add_argument("--max-completion-tokens", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=45.0, help="in which the requests of a run arrive")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", type=float, default=0.1)
    parser.add_argument(
        "--rates", nargs="+", metavar="SERVER=RATE,...", help="run at these instead of searching"
    )
    parser.add_argument("--plot", type=Path, help="write charts of latency against load there")
    parser.add_argument(
        "--merge", nargs="*", type=Path, default=[], help="files that --json wrote, for the charts"
    )
    arguments = parser.parse_args()
    rates = parse_rates(arguments.rates or [])
    options = LoadOptions(
        traffic=arguments.trace,
        data=data_folder(arguments.data),
        seconds=arguments.seconds,
        seed=arguments.seed,
        length_scale=arguments.length_scale,
        max_prompt_tokens=arguments.max_prompt_tokens,
        max_completion_tokens=arguments.max_completion_tokens,
        slo=Slo.parse(arguments.slo),
    )
    measured: dict[str, dict[str, Any]] = {}
    with run_servers(arguments) as servers:
        for name, server in servers.items():
            with measuring(server):
                measured[name] = asyncio.run(measure(server, options, arguments, rates.get(name)))
        results = {"versions": versions(list(servers.values())), "servers": measured}
    results["ratios"] = ratios(measured)
    publish(arguments, results, table(measured, results["ratios"]))
    if arguments.plot:
        by_server: dict[str, list[Any]] = {}
        documents = [json.loads(path.read_text(encoding="utf-8"))["results"] for path in arguments.merge]
        for document in (*documents, results):
            for name, result in document["servers"].items():
                by_server.setdefault(name, []).extend(result["rows"])
        plot_rows(by_server, arguments.plot, title=f"{arguments.model}, {arguments.trace} traffic")


def parse_rates(texts: list[str]) -> dict[str, list[float]]:
    """
    >>> parse_rates(["fastserve=1,2", "vllm=0.5"])
    {'fastserve': [1.0, 2.0], 'vllm': [0.5]}
    """
    parts = (text.partition("=") for text in texts)
    return {name: [float(rate) for rate in rates.split(",")] for name, _, rates in parts}


async def measure(
    server: RunningServer, options: LoadOptions, arguments: argparse.Namespace, rates: list[float] | None
) -> dict[str, Any]:
    endpoint = EndpointOptions(url=server.url, model=server.model)
    result: dict[str, Any] = {}
    async with LoadTest(endpoint, options) as test:
        if rates is not None:
            for rate in rates:
                say(server, await test.run_at(rate))
        elif not arguments.rates:
            start = START_RATES[server.name]
            held, missed = await test.find_rate(
                start=start, precision=arguments.precision, report=lambda row: say(server, row)
            )
            result |= {"rate_held": held, "rate_missed": missed}
    return result | {
        "rows": [row.to_json() for row in test.rows],
        "ignores_eos": test.abilities.ignores_eos,
        "tokens_per_word": test.token_rate.per_word,
    }


def say(server: RunningServer, row: LoadRow) -> None:
    figures = row.figures
    print(
        f"{server.name} at {row.rate:.3g}/s: {'held' if row.is_held else 'missed'}; "
        f"{figures['num_finished']} answered, {figures['num_failed']} not; "
        f"{figures['normalized_mean_seconds']:.3f} s a token, p99 TTFT {figures['ttft_p99_seconds']:.2f} s, "
        f"{figures['output_tokens_per_second']:.0f} tokens/s, "
        f"client {figures['client_cpu_share']:.1%} of a core",
        flush=True,
    )


def ratios(measured: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Our highest rate over that of each peer, where both were searched."""
    ours = measured.get("fastserve", {}).get("rate_held")
    return {
        name: ours / measured[name]["rate_held"]
        for name in TARGETS
        if ours is not None and "rate_held" in measured.get(name, {})
    }


def table(measured: dict[str, dict[str, Any]], found: dict[str, float]) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for name, result in measured.items():
        if "rate_held" in result:
            text = f"{result['rate_held']:.3g} held, {result['rate_missed']:.3g} missed"
            rows.append((f"{name}, requests a second", text))
    for name, ratio in found.items():
        rows.append((f"ratio to {name} (target: {TARGETS[name]:g})", f"{ratio:.2f}"))
    for name, result in measured.items():
        for row in result["rows"]:
            state = "held" if row["slo_is_held"] else "missed"
            normalized, ttft = row["normalized_mean_seconds"], row["ttft_p99_seconds"]
            rows.append(
                (
                    f"{name} at {row['rate']:.3g}/s",
                    f"{state}: {normalized:.3f} s a token, p99 TTFT {ttft:.2f} s",
                )
            )
    return rows


if __name__ == "__main__":
    main()
