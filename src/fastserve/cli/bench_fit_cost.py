"""`fastserve bench fit-cost`: what a step costs, for `bench schedule --cost FILE`."""

from __future__ import annotations

import click

from fastserve.cli.engine_option import engine_options, model_argument
from fastserve.cli.option import json_option, offline_option
from fastserve.cli.report import format_bytes, print_json, print_table
from fastserve.config import EngineOptions


@click.command()
@model_argument
@engine_options("weights", "kv_dtype", "threads")
@json_option
@offline_option
def fit_cost(model: str, options: EngineOptions, json: bool, offline: bool) -> None:
    """Time real steps of a model, of many kinds, and fit what they cost: a minute or two.

    With --json, what is written is a machine for `fastserve bench schedule --cost FILE`.
    """
    from fastserve.engine.load import load_model
    from fastserve.evaluate.fit_cost import fit_machine, to_json
    from fastserve.hub.resolve import resolve

    loaded = load_model(resolve(model, offline=offline), options, name=model, task="generate")
    machine, fit = fit_machine(loaded, options, name=model)
    if json:
        print_json(to_json(machine, fit))
        return
    rows = [
        (name.replace("_", " "), f"{value * 1e6:.4g} us")
        for name, value in machine.to_json()["cost"].items()
        if value
    ]
    rows.append(("swap seconds per block", f"{machine.swap_seconds_per_block * 1e6:.4g} us"))
    rows.append(("a block", f"{format_bytes(fit.block_bytes)}, {machine.block_size} tokens"))
    rows.append(("swap", f"{fit.swap_bytes_per_second / 1e9:.2f} GB/s"))
    rows.append(("steps, of which outliers", f"{fit.num_steps}, {fit.num_outliers}"))
    rows.append(("error, median and 90th percentile", f"{fit.median_error:.1%}, {fit.p90_error:.1%}"))
    rows.append(("error of the sum", f"{fit.total_error:+.1%}"))
    print_table(("of a step", ""), rows)
