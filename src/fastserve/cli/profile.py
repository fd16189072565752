"""`--profile`: where the time of a run went, op by op."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING

import click

from fastserve.cli.report import print_table
from fastserve.errors import OptionError

if TYPE_CHECKING:
    from fastserve.engine.llm import LLM

profile_option = click.option(
    "--profile",
    is_flag=True,
    help="Show on standard error where the time went, against the machine's limits.",
)


@contextmanager
def profiling(llm: LLM, *, shown: bool) -> Iterator[None]:
    """Profile what runs within the context, and print the profile on standard error after it.

    Raises:
        OptionError: `shown`, and the model runs on the torch backend.
    """
    if not shown:
        yield
        return
    from fastserve.backends.native.executable import NativeExecutable
    from fastserve.backends.prefix import PrefixedExecutable
    from fastserve.evaluate.machine import measure_limits
    from fastserve.evaluate.profile import PROFILE_HEADER, group_calls, profile_rows

    executable = llm.model.executable
    if isinstance(executable, PrefixedExecutable):
        executable = executable.inner
    if not isinstance(executable, NativeExecutable):
        raise OptionError("profile=True needs backend='native'", hint="leave out --profile or --backend")
    with executable.profiling() as calls:
        yield
    limits = measure_limits(executable.num_threads)
    with redirect_stdout(sys.stderr):
        print_table(PROFILE_HEADER, profile_rows(group_calls(calls), limits))
