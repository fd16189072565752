"""`fastserve bench limits`: what the machine does at most."""

from __future__ import annotations

from dataclasses import asdict

import click

from fastserve.cli.option import json_option
from fastserve.cli.report import format_bytes, print_json, print_table


@click.command()
@click.option("--threads", type=int, help="By default one for each core that this process may use.")
@click.option("--seconds", type=float, default=0.5, help="How long to measure each limit.")
@json_option
def limits(threads: int | None, seconds: float, json: bool) -> None:
    """Measure the machine's limits: reading memory, by working set and threads, and arithmetic.

    Each is the best of what was tried, several ways of reading among them: a limit is what is possible.
    """
    from fastserve.backends.native.cores import count_cores
    from fastserve.evaluate.machine import measure_limits, measure_read_rates

    cores = count_cores()
    machine = measure_limits(threads, seconds=seconds)
    rates = measure_read_rates(threads, seconds=seconds)
    if json:
        print_json({**machine.to_json(), "cores": asdict(cores), "reads": [asdict(rate) for rate in rates]})
        return
    print(f"{machine.isa}, {machine.threads} threads of {cores}")
    working_set = format_bytes(machine.working_set_bytes)
    print(f"read    {machine.read_bytes_per_second / 1e9:.1f} GB/s of {working_set} ({machine.read_kernel})")
    print(f"int8    {machine.int8_operations_per_second / 1e12:.2f} TOP/s")
    print(f"f32     {machine.f32_operations_per_second / 1e12:.2f} TFLOP/s")
    rows = [
        (
            format_bytes(rate.working_set_bytes),
            str(rate.threads),
            f"{rate.bytes_per_second / 1e9:.1f}",
            rate.kernel,
        )
        for rate in rates
    ]
    print_table(("working set", "threads", "GB/s", "fastest way to read"), rows)
