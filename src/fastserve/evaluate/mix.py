"""Mixes of requests defined by numbers, some of them with lengths from published traces.

*Around* a number is the median of a log-normal distribution; a mean is said to be one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastserve.errors import TraceError
from fastserve.evaluate.trace import (
    DATA_VARIABLE,
    LengthTrace,
    RateTrace,
    TimedTrace,
    find_trace,
    read_trace,
)
from fastserve.evaluate.traffic import Clients, Lengths, Mix, Part, Replay, Traffic
from fastserve.types import Int64Array

AZURE_CODE = "traces/azure2023/AzureLLMInferenceTrace_code.csv"
SHAREGPT = "traces/sarathi/sharegpt_8k_filtered_stats_llama2_tokenizer.csv"
ARXIV = "traces/vidur_processed/arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv"

_MAX_PROMPT_TOKENS = 8192
_MAX_COMPLETION_TOKENS = 4096

Draw = Callable[[np.random.Generator, int], Lengths]


def make_traffic(name: str, *, data: Path | None, cv: float | None = None) -> Traffic:
    """The mix of a name, or the trace at a path.

    Args:
        data: the folder of published traces; a mix that needs none does without.
        cv: of the gaps between arrivals, in place of the mix's own.

    Raises:
        TraceError: neither a mix nor a trace; or data that a mix needs is missing.
    """
    if name in MIXES:
        mix = MIXES[name](data)
        return mix if cv is None else replace(mix, cv=cv)
    try:
        path = find_trace(name, data)
    except TraceError as error:
        raise TraceError(error.message, hint=f"{error.hint}; mixes are {', '.join(MIXES)}") from None
    trace = read_trace(path)
    match trace:
        case TimedTrace():
            return Replay(path.stem, trace)
        case RateTrace():
            return Clients(path.stem, trace, draw_chat)
        case LengthTrace():
            return Mix(path.stem, (Part("", 1.0, draw_from(trace.lengths)),), cv=1.0 if cv is None else cv)


def short_chat(data: Path | None = None) -> Mix:
    """Prompts of 16 to 400 tokens, uniform; completions around 120, sigma 1.3."""
    return Mix("short-chat", (Part("chat", 1.0, _draw_short),))


def sharegpt(data: Path | None) -> Mix:
    """Lengths of ShareGPT's conversations; gaps with a CV of 2."""
    return Mix("sharegpt", (Part("chat", 1.0, draw_from(_read_data(SHAREGPT, data))),), cv=2.0)


def mixed(data: Path | None) -> Mix:
    """Half chat, a quarter code completion, the rest long conversations, summaries and reasoning."""
    return Mix(
        "mixed",
        (
            Part("chat", 0.50, draw_chat),
            Part("code", 0.25, draw_from(_read_data(AZURE_CODE, data))),
            Part("conversation", 0.15, draw_from(_read_data(SHAREGPT, data))),
            Part("summary", 0.05, draw_from(_read_data(ARXIV, data))),
            Part("reasoning", 0.05, _draw_reasoning),
        ),
    )


MIXES: dict[str, Callable[[Path | None], Mix]] = {
    "short-chat": short_chat,
    "sharegpt": sharegpt,
    "mixed": mixed,
}


def draw_chat(rng: np.random.Generator, n: int) -> Lengths:
    """Prompts of 1,155 tokens on average, completions of 211: the means of Azure's 2023 conversation trace
    (Splitwise, ISCA 2024), with sigmas between those that fit its median and its 99th percentile."""
    return (
        _log_normal(rng, n, mean=1155, sigma=0.6, high=_MAX_PROMPT_TOKENS),
        _log_normal(rng, n, mean=211, sigma=0.8, high=_MAX_COMPLETION_TOKENS),
    )


def draw_from(lengths: tuple[tuple[int, int], ...]) -> Draw:
    """Pairs of lengths drawn from those of a trace, with replacement."""
    table = np.array(lengths, np.int64)  # [pairs, 2]

    def draw(rng: np.random.Generator, n: int) -> Lengths:
        chosen = table[rng.integers(len(table), size=n)]
        return chosen[:, 0], chosen[:, 1]

    return draw


def _draw_short(rng: np.random.Generator, n: int) -> Lengths:
    prompts = rng.integers(16, 400, size=n, endpoint=True)
    return prompts, _log_normal(rng, n, median=120, sigma=1.3, high=_MAX_COMPLETION_TOKENS)


def _draw_reasoning(rng: np.random.Generator, n: int) -> Lengths:
    prompts = rng.integers(50, 800, size=n, endpoint=True)
    return prompts, _log_normal(rng, n, median=1500, sigma=0.8, high=2 * _MAX_COMPLETION_TOKENS)


def _log_normal(
    rng: np.random.Generator,
    n: int,
    *,
    median: float | None = None,
    mean: float | None = None,
    sigma: float,
    high: int,
) -> Int64Array:
    """Whole numbers from 1 to `high`, what is beyond counting as `high`."""
    if median is None:
        assert mean is not None
        median = mean * float(np.exp(-(sigma**2) / 2))
    return np.clip(rng.lognormal(np.log(median), sigma, n).round(), 1, high).astype(np.int64)


def _read_data(file: str, data: Path | None) -> tuple[tuple[int, int], ...]:
    """The lengths in a published trace."""
    if data is None or not (data / file).is_file():
        place = f"{data} has no {file}" if data else "no folder of data is named"
        raise TraceError(
            f"the mix takes lengths from a published trace, and {place}",
            hint=f"name the folder with --data or {DATA_VARIABLE}, or choose short-chat, which needs none",
        )
    trace = read_trace(data / file)
    if isinstance(trace, LengthTrace):
        return trace.lengths
    assert isinstance(trace, TimedTrace), f"{file} has no lengths"
    return tuple((a.prompt_tokens, a.completion_tokens) for a in trace.arrivals)
