"""`fastserve bench schedule`: what scheduling policies make of a stream of requests, in simulation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastserve.cli.engine_option import schedule_options
from fastserve.cli.option import json_option
from fastserve.cli.report import print_json, print_table
from fastserve.config import ScheduleOptions
from fastserve.errors import OptionError

if TYPE_CHECKING:
    from fastserve.evaluate.schedule_comparison import Comparison
    from fastserve.evaluate.schedule_sweep import Run, Sweep

_COLUMNS = {
    "TTFT mean": "ttft_mean_seconds",
    "p99": "ttft_p99_seconds",
    "TPOT mean": "tpot_mean_seconds",
    "gap p99": "gap_p99_seconds",
    "e2e mean": "e2e_mean_seconds",
    "e2e p99": "e2e_p99_seconds",
    "slowdown": "slowdown_mean",
    "good/s": "goodput_per_second",
    "preempted": "preemptions_per_request",
    "evicted": "evictions_per_request",
    "swapped": "swapped_blocks_out",
    "hits": "prefix_hit_share",
    "refused": "refused",
}


@click.command()
@click.option("--trace", required=True, metavar="FILE|MIX", help="A trace, or short-chat, sharegpt or mixed.")
@click.option(
    "--policy", required=True, metavar="NAME,...", help="Compared; a knob follows as in mlfq:growth=4."
)
@click.option("--load", default="0.8", metavar="X,...", help="1.0 is the capacity, measured beforehand.")
@click.option("--seeds", type=click.IntRange(1, 1000), default=1, help="Runs on different requests.")
@click.option("--cost", default="cpu", metavar="cpu|a100|FILE", help="The machine; FILE is from fit-cost.")
@click.option("--requests", type=int, help="Of a run; by default all of a trace, 10000 of a mix.")
@click.option("--data", type=click.Path(path_type=Path), help="Folder of traces (also: FASTSERVE_TEST_DATA).")
@click.option("--cv", type=float, help="Of the gaps between arrivals of a mix, in place of its own.")
@click.option("--kv-tokens", type=int, help="Room for keys and values, in place of the machine's.")
@schedule_options(
    ScheduleOptions(fair_share="off"),
    "fair_share",
    "target_gap_seconds",
    "most_slack_seconds",
    "peak_quantile",
    "pause_budget_seconds",
    "first_token_seconds",
)
@click.option("--ttft-objective", type=float, default=2.0, help="Seconds, of a good request.")
@click.option("--tpot-objective", type=float, default=0.1, help="Seconds, of a good request.")
@click.option("--processes", type=click.IntRange(1), help="At once; by default the cores of this process.")
@click.option("--check", is_flag=True, help="Assert the scheduler's invariants after every step: slow.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write charts of latency against load there.")
@json_option
def schedule(
    trace: str,
    policy: str,
    load: str,
    seeds: int,
    cost: str,
    requests: int | None,
    data: Path | None,
    cv: float | None,
    kv_tokens: int | None,
    options: ScheduleOptions,
    ttft_objective: float,
    tpot_objective: float,
    processes: int | None,
    check: bool,
    plot: Path | None,
    json: bool,
) -> None:
    """Simulate policies on a trace or a mix: the real scheduler and block pool, a fake clock, priced steps.

    All policies get the same requests. Ratios are to the first policy, over all seeds, with 95 % bootstrap
    intervals; good requests keep both objectives.
    """
    from fastserve.evaluate.latency import Objective
    from fastserve.evaluate.schedule_comparison import compare
    from fastserve.evaluate.schedule_sweep import Sweep, capacity_of, run_sweep
    from fastserve.evaluate.simulated_machine import load_machine
    from fastserve.evaluate.trace import data_folder

    machine = load_machine(cost)
    sweep = Sweep(
        traffic=trace,
        machine=machine if kv_tokens is None else machine.with_kv_tokens(kv_tokens),
        policies=split_policies(policy),
        loads=_parse_loads(load),
        num_seeds=seeds,
        num_requests=requests,
        data=data_folder(data),
        cv=cv,
        options=options,
        objective=Objective(ttft_seconds=ttft_objective, tpot_seconds=tpot_objective),
        checks=check,
    )
    runs = run_sweep(sweep, processes=processes)
    comparisons = compare(runs)
    if plot is not None:
        from fastserve.evaluate.schedule_plot import plot_runs

        plot_runs(runs, plot, title=f"{Path(trace).stem} on {machine.name}")
    if json:
        print_json(_to_json(sweep, capacity_of(sweep), runs, comparisons))
    else:
        _print_runs(runs)
        _print_comparisons(comparisons)


def split_policies(text: str) -> tuple[str, ...]:
    """Policies parted by commas, as are the knobs of one: what has `=` and no `:` belongs to the one before.

    >>> split_policies("fcfs,mlfq:growth=4,margin=3,sjf")
    ('fcfs', 'mlfq:growth=4,margin=3', 'sjf')
    """
    policies: list[str] = []
    for part in text.split(","):
        if policies and "=" in part and ":" not in part:
            policies[-1] += f",{part}"
        else:
            policies.append(part.strip())
    return tuple(dict.fromkeys(policies))


def _parse_loads(text: str) -> tuple[float, ...]:
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise OptionError(
            f"load={text!r} is not a list of numbers", hint="give some such as 0.5,0.8,1.1"
        ) from None


def _to_json(sweep: Sweep, capacity: float, runs: list[Run], comparisons: list[Comparison]) -> dict[str, Any]:
    return {
        "trace": sweep.traffic,
        "machine": sweep.machine.to_json(),
        "capacity_work_seconds_per_second": capacity,
        "objective": {
            "ttft_seconds": sweep.objective.ttft_seconds,
            "tpot_seconds": sweep.objective.tpot_seconds,
        },
        "rows": [run.to_json() for run in runs],
        "ratios_to_first": [comparison.to_json() for comparison in comparisons],
    }


def _print_runs(runs: list[Run]) -> None:
    rows = [
        [run.policy, f"{run.load:g}", str(run.seed)]
        + [_format(run.figures[figure]) for figure in _COLUMNS.values()]
        for run in runs
    ]
    print_table(["policy", "load", "seed", *_COLUMNS], rows)


def _print_comparisons(comparisons: list[Comparison]) -> None:
    if comparisons:
        print()
        names = list(comparisons[0].ratios)
        rows = [[c.policy, f"{c.load:g}", *(str(c.ratios[name]) for name in names)] for c in comparisons]
        print_table(["ratio of", "load", *(name.replace("_", " ") for name in names)], rows)


def _format(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
