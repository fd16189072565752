"""`fastserve bench serve`: a server under load, as its clients see it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from fastserve.cli.option import json_option
from fastserve.cli.report import print_error, print_json, print_table
from fastserve.errors import MeasurementError, OptionError
from fastserve.option import INT32_MAX, check_integer, check_number

if TYPE_CHECKING:
    from fastserve.evaluate.endpoint import EndpointOptions
    from fastserve.evaluate.load_test import LoadOptions, LoadRow, LoadTest
    from fastserve.evaluate.slo import Slo

API_KEY_VARIABLE = "FASTSERVE_API_KEY"

_DEFAULT_SLO = "normalized_mean=0.15,ttft_p99=5"
_DEFAULT_PRECISION = 0.05
_DEFAULT_SECONDS = 60.0
_COLUMNS = {
    "finished": "num_finished",
    "failed": "num_failed",
    "req/s": "requests_per_second",
    "tokens/s": "output_tokens_per_second",
    "TTFT mean": "ttft_mean_seconds",
    "p99": "ttft_p99_seconds",
    "TPOT mean": "tpot_mean_seconds",
    "ITL p99": "itl_p99_seconds",
    "gap p99": "gap_p99_seconds",
    "e2e mean": "e2e_mean_seconds",
    "e2e p99": "e2e_p99_seconds",
    "per token": "normalized_mean_seconds",
    "good/s": "goodput_per_second",
    "client CPU": "client_cpu_share",
}


@click.command()
@click.option(
    "--url", required=True, help="Of a server with the API of OpenAI, such as http://127.0.0.1:8000."
)
@click.option("--model", required=True, metavar="NAME", help="As the server calls it.")
@click.option("--trace", required=True, metavar="FILE|MIX", help="A trace, or short-chat, sharegpt or mixed.")
@click.option(
    "--prompts",
    metavar="FILE",
    help="A data set, in JSON, whose prompts are sent, in place of text of the trace's lengths.",
)
@click.option("--rate", metavar="X,...", help="Requests a second, sent whatever the server does.")
@click.option("--concurrency", metavar="N,...", help="In place of a rate: so many requests at once.")
@click.option(
    "--time-scale",
    type=float,
    help="In place of a rate: the times of the trace, stretched by so much; 1 is as they are.",
)
@click.option(
    "--find-rate",
    is_flag=True,
    help="Find the highest rate that holds --slo, by bisection from --rate (by default 1) on.",
)
@click.option(
    "--slo",
    metavar="FIGURE=X,...",
    help=f"What a run is to hold, such as {_DEFAULT_SLO}, which is the default of --find-rate.",
)
@click.option(
    "--precision",
    type=float,
    help=f"Of --find-rate, a share of the rate, by default {_DEFAULT_PRECISION}.",
)
@click.option(
    "--api",
    type=click.Choice(("completions", "chat")),
    default="completions",
    help="Whether prompts are completed as they are, or are messages of a user.",
)
@click.option(
    "--requests", type=int, help="Of a run; by default as many as come in --seconds, or 64 at least."
)
@click.option(
    "--seconds", type=float, help=f"How long requests of a run arrive, by default {_DEFAULT_SECONDS:g}."
)
@click.option("--warm-up", type=int, default=8, help="Requests before the first run, which are not counted.")
@click.option("--seed", type=int, default=0, help="Of the requests and their times.")
@click.option(
    "--burstiness",
    type=float,
    help="Shape of gamma distributed gaps between requests, in place of the trace's: 1 is Poisson, less has "
    "bursts.",
)
@click.option("--length-scale", type=float, default=1.0, help="Of prompts and completions.")
@click.option("--max-prompt-tokens", type=int, help="Longer prompts are cut to that length.")
@click.option("--max-completion-tokens", type=int, help="Longer completions are cut to that length.")
@click.option("--data", type=click.Path(path_type=Path), help="Folder of traces (also: FASTSERVE_TEST_DATA).")
@click.option("--ttft-objective", type=float, default=2.0, help="Seconds, of a good request.")
@click.option("--tpot-objective", type=float, default=0.1, help="Seconds, of a good request.")
@click.option(
    "--stall", type=float, default=120.0, help="Seconds without text after which a request is given up."
)
@click.option("--plot", type=click.Path(path_type=Path), help="Write charts of latency against load there.")
@json_option
def serve(
    url: str,
    model: str,
    trace: str,
    prompts: str | None,
    rate: str | None,
    concurrency: str | None,
    time_scale: float | None,
    find_rate: bool,
    slo: str | None,
    precision: float | None,
    api: Literal["completions", "chat"],
    requests: int | None,
    seconds: float | None,
    warm_up: int,
    seed: int,
    burstiness: float | None,
    length_scale: float,
    max_prompt_tokens: int | None,
    max_completion_tokens: int | None,
    data: Path | None,
    ttft_objective: float,
    tpot_objective: float,
    stall: float,
    plot: Path | None,
    json: bool,
) -> None:
    """Put a server under load and tell what its clients see: latencies, throughput, failures by kind.

    Requests are streamed, greedy, and as long as the trace says where the server takes `ignore_eos`. Prompts
    are real text where the folder of data has some. An API key is taken from FASTSERVE_API_KEY. Good requests
    keep both objectives; an SLO holds where all its figures do and no request fails.
    """
    from fastserve.evaluate.endpoint import EndpointOptions
    from fastserve.evaluate.find_rate import check_precision
    from fastserve.evaluate.latency import Objective
    from fastserve.evaluate.load_test import LoadOptions
    from fastserve.evaluate.trace import data_folder

    _check_loop(rate=rate, concurrency=concurrency, time_scale=time_scale, find_rate=find_rate)
    if concurrency is not None:
        _refuse({"--burstiness": burstiness, "--seconds": seconds}, "has no effect with --concurrency")
    if not find_rate:
        _refuse({"--precision": precision}, "has no effect without --find-rate")
    precision = _DEFAULT_PRECISION if precision is None else precision
    check_precision(precision)
    options = LoadOptions(
        traffic=trace,
        data=data_folder(data),
        prompts=prompts,
        num_requests=requests,
        seconds=_DEFAULT_SECONDS if seconds is None else seconds,
        seed=seed,
        burstiness=burstiness,
        time_scale=time_scale,
        length_scale=length_scale,
        max_prompt_tokens=INT32_MAX if max_prompt_tokens is None else max_prompt_tokens,
        max_completion_tokens=INT32_MAX if max_completion_tokens is None else max_completion_tokens,
        warm_up=warm_up,
        stall_seconds=stall,
        objective=Objective(ttft_seconds=ttft_objective, tpot_seconds=tpot_objective),
        slo=_parse_slo(slo, is_needed=find_rate),
    )
    endpoint = EndpointOptions(url=url, model=model, api=api, api_key=os.environ.get(API_KEY_VARIABLE))
    rates = (None,) if rate is None else _parse_list("rate", rate, float)
    concurrencies = None if concurrency is None else _parse_list("concurrency", concurrency, int)
    if find_rate and len(rates) > 1:
        raise OptionError(
            f"--find-rate begins at one rate, and --rate gives {len(rates)}", hint="give the first alone"
        )
    if plot is not None:
        from fastserve.evaluate.plot import check_plot

        check_plot(plot)
    found: tuple[float, float] | None = None
    failures: list[MeasurementError] = []  # told once the results are
    if find_rate:
        test, outcome = asyncio.run(_find(endpoint, options, start=rates[0] or 1.0, precision=precision))
        if isinstance(outcome, MeasurementError):
            failures.append(outcome)
        else:
            found = outcome
    else:
        test = asyncio.run(_run_all(endpoint, options, rates, concurrencies))
    if json:
        print_json(_to_json(endpoint, test, found))
    else:
        _print_rows(test, found)
    if not failures and not any(row.figures["num_finished"] for row in test.rows):
        hint = "see what failed above, and the server's log"
        failures.append(MeasurementError("no request was answered whole", hint=hint))
    if plot is not None:
        from fastserve.evaluate.load_plot import plot_rows

        try:
            plot_rows(
                {model: [row.to_json() for row in test.rows]}, plot, title=f"{Path(trace).stem}, {model}"
            )
        except OSError as error:
            hint = "see that the folder is there and not full, and that you may write it"
            failures.append(MeasurementError(f"{error.filename or plot}: {error.strerror}", hint=hint))
    for failure in failures:  # not as JSON, whose one document has been printed
        print_error(type(failure).__name__, failure.message, failure.hint, as_json=False)
    if failures:
        click.get_current_context().exit(2)


async def _run_all(
    endpoint: EndpointOptions,
    options: LoadOptions,
    rates: Sequence[float | None],
    concurrencies: Sequence[int] | None,
) -> LoadTest:
    from fastserve.evaluate.load_test import LoadTest

    async with LoadTest(endpoint, options) as test:
        if concurrencies is not None:
            for concurrency in concurrencies:
                await test.run_with(concurrency)
        else:
            for rate in rates:
                await test.run_at(rate)
    return test


async def _find(
    endpoint: EndpointOptions, options: LoadOptions, *, start: float, precision: float
) -> tuple[LoadTest, tuple[float, float] | MeasurementError]:
    """The rates found, or why there are none; what was measured on the way is in the test."""
    from fastserve.evaluate.load_test import LoadTest

    async with LoadTest(endpoint, options) as test:
        try:
            return test, await test.find_rate(start=start, precision=precision)
        except MeasurementError as error:
            return test, error


def _check_loop(
    *, rate: str | None, concurrency: str | None, time_scale: float | None, find_rate: bool
) -> None:
    """Exactly one of the ways to send requests is chosen."""
    ways = {"--rate": rate, "--concurrency": concurrency, "--time-scale": time_scale}
    given = [name for name, value in ways.items() if value is not None]
    if find_rate:
        given = [name for name in given if name != "--rate"] + ["--find-rate"]
    if len(given) != 1:
        said = " and ".join(given) if given else "no way to send requests"
        raise OptionError(
            f"{said} {'exclude each other' if given else 'is chosen'}",
            hint="give one of --rate, --concurrency, --time-scale and --find-rate",
        )


def _refuse(options: Mapping[str, object], reason: str) -> None:
    """No option is given that would be ignored."""
    for name, value in options.items():
        if value is not None:
            raise OptionError(f"{name} {reason}", hint="leave it out")


def _parse_slo(text: str | None, *, is_needed: bool) -> Slo | None:
    from fastserve.evaluate.slo import Slo

    if text is None:
        return Slo.parse(_DEFAULT_SLO) if is_needed else None
    return Slo.parse(text)


def _parse_list(name: str, text: str, kind: type[float] | type[int]) -> tuple[Any, ...]:
    try:
        values = tuple(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        raise OptionError(
            f"{name}={text!r} is not a list of numbers", hint="give some such as 1,2,4"
        ) from None
    for value in values:
        if kind is int:
            check_integer(name, value, low=1, high=10_000)
        else:
            check_number(name, value, 0.0, 1e5, is_low_open=True)
    return values


def _to_json(endpoint: EndpointOptions, test: LoadTest, found: tuple[float, float] | None) -> dict[str, Any]:
    options = test.options
    document: dict[str, Any] = {
        "url": endpoint.url,
        "model": endpoint.model,
        "api": endpoint.api,
        "trace": options.traffic,
        "seed": options.seed,
        "length_scale": options.length_scale,
        "prompts": test.text.source if options.prompts is None else options.prompts,
        "tokens_per_word": test.token_rate.per_word,
        "ignores_eos": test.abilities.ignores_eos,
        "tells_usage": test.abilities.tells_usage,
        "objective": asdict(options.objective),
        "slo": None if options.slo is None else dict(options.slo.bounds),
        "rows": [row.to_json() for row in test.rows],
    }
    if found is not None:
        document |= {"rate_held": found[0], "rate_missed": found[1]}
    return document


def _print_rows(test: LoadTest, found: tuple[float, float] | None) -> None:
    from fastserve.evaluate.load_figures import count_failures, failure_messages

    header = ["load", *_COLUMNS, *(["SLO"] if test.options.slo else [])]
    print_table(header, [_row(row) for row in test.rows])
    if not test.abilities.ignores_eos:
        print("the server does not take ignore_eos: completions may be shorter than planned")
    if not test.abilities.tells_usage:
        print("the server tells no usage: pieces of text are counted as tokens")
    for row in test.rows:
        for kind, count in count_failures(row.run.exchanges).items():
            said = failure_messages(row.run.exchanges).get(kind)
            print(f"{_load(row)}: {count} x {kind}{f': {said}' if said else ''}")
    if found is not None:
        print(f"the SLO holds at {found[0]:.3g} requests a second, and no longer at {found[1]:.3g}")


def _row(row: LoadRow) -> list[str]:
    cells = [_load(row), *(_format(row.figures[figure]) for figure in _COLUMNS.values())]
    if row.is_held is not None:
        cells.append("held" if row.is_held else "missed")
    return cells


def _load(row: LoadRow) -> str:
    if row.concurrency is not None:
        return f"{row.concurrency} at once"
    return "trace" if row.rate is None else f"{row.rate:.3g}/s"


def _format(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}"
