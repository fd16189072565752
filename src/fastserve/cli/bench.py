"""`fastserve bench`: how fast the machine, the kernels, whole models and servers are."""

from __future__ import annotations

import click

from fastserve.cli.command_group import LazyCommandGroup

SUBCOMMANDS = {
    "limits": "fastserve.cli.bench_limits",
    "kernels": "fastserve.cli.bench_kernels",
    "model": "fastserve.cli.bench_model",
    "make-model": "fastserve.cli.bench_make_model",
    "fit-cost": "fastserve.cli.bench_fit_cost",
    "schedule": "fastserve.cli.bench_schedule",
    "serve": "fastserve.cli.bench_serve",
}


@click.group(cls=LazyCommandGroup, modules=SUBCOMMANDS, no_args_is_help=False)
def bench() -> None:
    """Measure the machine, the kernels, whole models and servers, alone and against others."""
