"""What admission by predicted peak buys under memory pressure, in simulation; writes its table of
docs/scheduling.md from the results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from fastserve.config import ScheduleOptions
from fastserve.evaluate.schedule_sweep import Sweep, run_sweep
from fastserve.evaluate.simulated_machine import load_machine
from fastserve.evaluate.trace import DATA_VARIABLE, data_folder
from performance_table import CHECKOUT, insert, to_markdown
from report import make_parser, publish

RESULTS = CHECKOUT / "bench" / "results" / "scheduling" / "peak_admission.json"
DOCUMENT = CHECKOUT / "docs" / "scheduling.md"
FIGURES = ("e2e_mean_seconds", "e2e_p99_seconds", "gap_p99_seconds", "evictions_per_request")


@dataclass(frozen=True)
class Pressure:
    """Traffic on a machine with little memory; without a slow tier what is evicted is computed again."""

    traffic: str
    machine: str
    load: float
    num_requests: int
    kv_tokens: int
    has_slow_tier: bool

    @property
    def name(self) -> str:
        tier = "" if self.has_slow_tier else ", no slow tier"
        return f"{self.traffic}, load {self.load:g}, `{self.machine}`, {self.kv_tokens:,} KV tokens{tier}"


PRESSURES = (
    Pressure("sharegpt", "a100", 1.08, 800, 60_000, True),
    Pressure("sharegpt", "a100", 1.08, 800, 60_000, False),
    Pressure("sharegpt", "cpu", 1.08, 400, 30_000, False),
    Pressure("mixed", "a100", 1.1, 800, 40_000, True),
    Pressure("mixed", "a100", 1.1, 800, 40_000, False),
    Pressure("short-chat", "cpu", 1.1, 800, 8_000, False),
)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--policy", default="boost")
    parser.add_argument("--quantiles", type=float, nargs="+", default=[0.0, 0.6, 0.8])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--data", type=Path, help=f"folder of traces (also: {DATA_VARIABLE})")
    parser.add_argument("--table", action="store_true", help="write the table from the results there are")
    arguments = parser.parse_args()
    if arguments.table:
        rows = json.loads(RESULTS.read_text(encoding="utf-8"))["results"]["rows"]
        text = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(insert(text, {"peak": table(rows)}), encoding="utf-8")
        return
    measured = [
        measure(pressure, arguments.policy, quantile, arguments.seeds, data_folder(arguments.data))
        for pressure in PRESSURES
        for quantile in arguments.quantiles
    ]
    publish(
        arguments,
        {"rows": measured},
        [
            (f"{row['name']}, quantile {row['quantile']:g}", "  ".join(f"{row[f]:.3f}" for f in FIGURES))
            for row in measured
        ],
    )


def measure(
    pressure: Pressure, policy: str, quantile: float, num_seeds: int, data: Path | None
) -> dict[str, Any]:
    machine = load_machine(pressure.machine).with_kv_tokens(pressure.kv_tokens)
    if not pressure.has_slow_tier:
        machine = replace(machine, num_slow_blocks=0)
    sweep = Sweep(
        traffic=pressure.traffic,
        machine=machine,
        policies=(policy,),
        loads=(pressure.load,),
        num_seeds=num_seeds,
        num_requests=pressure.num_requests,
        data=data,
        options=ScheduleOptions(fair_share="off", peak_quantile=quantile),
    )
    runs = run_sweep(sweep, processes=1)
    figures = {figure: mean(run.figures[figure] for run in runs) for figure in FIGURES}
    return {"name": pressure.name, "quantile": quantile, **figures}


def table(rows: list[Mapping[str, Any]]) -> str:
    cells = [
        [
            row["name"],
            f"{row['quantile']:g}",
            f"{row['e2e_mean_seconds']:.1f} s",
            f"{row['e2e_p99_seconds']:.1f} s",
            f"{row['gap_p99_seconds']:.2f} s",
            f"{row['evictions_per_request']:.3f}",
        ]
        for row in rows
    ]
    header = ["traffic", "quantile", "mean", "p99", "longest gap p99", "evictions a request"]
    return to_markdown(header, cells)


if __name__ == "__main__":
    main()
