"""Traces of requests as their sources publish them, told by their columns.

A file has requests with their times (Azure, Mooncake), lengths alone (Sarathi, Vidur), or how the rate of
each client changes (ServeGen, one file a client).
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fastserve.errors import TraceError
from fastserve.evaluate.arrival import PREFIX_TOKENS, Arrival

DATA_VARIABLE = "FASTSERVE_TEST_DATA"

_FORMATS = "Azure, Mooncake, Sarathi and Vidur lengths, ServeGen"
_AZURE = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
_LENGTHS = ["num_prefill_tokens", "num_decode_tokens"]
_WINDOW_FIELDS = ("start", "rate", "cv", "family", "shape", "scale")
_MAX_TOKENS = 2**24


@dataclass(frozen=True, slots=True)
class TimedTrace:
    """Requests with their times, the first at 0, in the order of arrival."""

    arrivals: tuple[Arrival, ...]


@dataclass(frozen=True, slots=True)
class LengthTrace:
    """Lengths of prompts and completions, in tokens, of requests without times."""

    lengths: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class RateWindow:
    """From `start_seconds` to the next window, gaps are Gamma or Weibull distributed with this shape."""

    start_seconds: float
    rate: float  # requests per second
    family: str
    shape: float


@dataclass(frozen=True, slots=True)
class RateTrace:
    """How the rates of clients change, by the name of the client."""

    clients: tuple[tuple[str, tuple[RateWindow, ...]], ...]


Trace = TimedTrace | LengthTrace | RateTrace


def data_folder(option: Path | None = None) -> Path | None:
    """The folder of real data: the one given, the one that FASTSERVE_TEST_DATA names, or none."""
    if option is not None:
        return option
    named = os.environ.get(DATA_VARIABLE)
    return Path(named) if named else None


def find_trace(name: str, folder: Path | None) -> Path:
    """The trace at a path, or at that path within `folder` or within its `traces`.

    Raises:
        TraceError: there is none.
    """
    candidates = [Path(name)]
    if folder is not None:
        candidates += [folder / name, folder / "traces" / name]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    place = f" or below {folder}" if folder else ""
    raise TraceError(
        f"no trace is at {name}{place}",
        hint=f"give the path of a file, or of the folder of data with --data or {DATA_VARIABLE}",
    )


def read_trace(path: Path) -> Trace:
    """Read a trace file, or a folder of ServeGen's clients.

    Raises:
        TraceError: it cannot be read, is of no known format, or a line of it is broken.
    """
    if path.is_dir():
        return _read_clients(sorted(path.glob("chunk-*-trace.csv")), path)
    first = next(_read_lines(path), (0, ""))[1]
    header = [field.strip() for field in first.split(",")]
    if first.startswith("{"):
        return _read_mooncake(path)
    if header[: len(_AZURE)] == _AZURE:
        return _read_azure(path)
    if header[: len(_LENGTHS)] == _LENGTHS:
        return _read_lengths(path)
    if len(header) == len(_WINDOW_FIELDS) and _is_number(header[0]):
        return _read_clients([path], path)
    raise TraceError(f"{path} is a trace of no known format", hint=f"known are those of {_FORMATS}")


def _read_azure(path: Path) -> TimedTrace:
    """https://github.com/Azure/AzurePublicDataset, AzureLLMInferenceDataset2023: times to 100 ns."""
    rows = [
        (
            _parse(path, line, "TIMESTAMP", row[0], _seconds_of_timestamp),
            _count(path, line, "ContextTokens", row[1]),
            _count(path, line, "GeneratedTokens", row[2]),
        )
        for line, row in _read_csv(path, num_fields=len(_AZURE), has_header=True)
    ]
    start = min((time for time, *_ in rows), default=0.0)
    return _timed(
        path,
        (
            Arrival(arrival_seconds=time - start, prompt_tokens=prompt, completion_tokens=completion)
            for time, prompt, completion in rows
        ),
    )


def _read_mooncake(path: Path) -> TimedTrace:
    """https://github.com/kvcache-ai/Mooncake, FAST25-release/traces: times in ms, ids of 512 tokens each."""
    return _timed(path, (_parse_mooncake(path, line, text) for line, text in _read_lines(path)))


def _parse_mooncake(path: Path, line: int, text: str) -> Arrival:
    try:
        record: Any = json.loads(text)
    except ValueError as error:
        raise _broken(path, line, "it", f"is no JSON: {error}") from None
    if not isinstance(record, dict):
        raise _broken(path, line, "it", f"is {text[:40]!r}, not an object")
    for field in ("timestamp", "input_length", "output_length"):
        if field not in record:
            raise _broken(path, line, field, "is missing")
    hash_ids = record.get("hash_ids", [])
    if not isinstance(hash_ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in hash_ids):
        raise _broken(path, line, "hash_ids", "are not a list of whole numbers from 0")
    prompt_tokens = _count(path, line, "input_length", record["input_length"])
    if len(hash_ids) > -(-prompt_tokens // PREFIX_TOKENS):
        raise _broken(path, line, "hash_ids", f"are {len(hash_ids)}, too many for {prompt_tokens} tokens")
    return Arrival(
        arrival_seconds=_parse(path, line, "timestamp", record["timestamp"], _non_negative) / 1000,
        prompt_tokens=prompt_tokens,
        completion_tokens=_count(path, line, "output_length", record["output_length"]),
        prefix_ids=tuple(hash_ids),
    )


def _read_lengths(path: Path) -> LengthTrace:
    """microsoft/sarathi-serve: data/processed_traces; microsoft/vidur: data/processed_traces."""
    lengths = tuple(
        (_count(path, line, _LENGTHS[0], row[0]), _count(path, line, _LENGTHS[1], row[1]))
        for line, row in _read_csv(path, num_fields=len(_LENGTHS), has_header=True)
    )
    _check_filled(path, lengths)
    return LengthTrace(lengths)


def _read_clients(files: Seq[Path], path: Path) -> RateTrace:
    """https://github.com/alibaba/ServeGen: a line is a window's start, rate, CV, family, shape and scale."""
    clients = tuple((file.name.removesuffix("-trace.csv"), tuple(_read_windows(file))) for file in files)
    if not any(window.rate for _, windows in clients for window in windows):
        raise TraceError(f"{path} holds no client that sends requests", hint="a client is chunk-N-trace.csv")
    return RateTrace(clients)


def _read_windows(path: Path) -> Iterator[RateWindow]:
    for line, row in _read_csv(path, num_fields=len(_WINDOW_FIELDS)):
        rate = _parse(path, line, "rate", row[1], _non_negative)
        if rate and row[3] not in ("Gamma", "Weibull"):
            raise _broken(path, line, "family", f"is {row[3]!r}, not Gamma or Weibull")
        shape = _parse(path, line, "shape", row[4], _non_negative)
        if rate and not shape:
            raise _broken(path, line, "shape", "is 0, of a client that sends requests")
        yield RateWindow(_parse(path, line, "start", row[0], _non_negative), rate, row[3], shape)


def _timed(path: Path, arrivals: Iterable[Arrival]) -> TimedTrace:
    ordered = tuple(sorted(arrivals, key=lambda arrival: arrival.arrival_seconds))
    _check_filled(path, ordered)
    if ordered[-1].arrival_seconds == ordered[0].arrival_seconds:
        raise TraceError(f"all requests of {path} come at one moment", hint="a trace needs two at least")
    return TimedTrace(ordered)


def _check_filled(path: Path, rows: Seq[object]) -> None:
    if not rows:
        raise TraceError(f"{path} holds no requests", hint="give a trace that has some")


def _read_csv(path: Path, *, num_fields: int, has_header: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Rows with the numbers of their lines, the header left out."""
    for line, text in _read_lines(path):
        if has_header and line == 1:
            continue
        row = next(csv.reader([text]))
        if len(row) < num_fields:
            raise _broken(path, line, "it", f"has {len(row)} fields of {num_fields}")
        yield line, row


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, with their numbers, from 1."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    yield number, text.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path} cannot be read: {error}", hint="give a text file") from error


def _count(path: Path, line: int, field: str, value: object) -> int:
    """A number of tokens."""
    return int(_parse(path, line, field, value, _parse_count))


def _parse_count(value: Any) -> int:
    count = int(value)
    if not 1 <= count <= _MAX_TOKENS or count != float(value):
        raise ValueError
    return count


def _non_negative(value: Any) -> float:
    number = float(value)
    if not 0 <= number < float("inf"):
        raise ValueError
    return number


def _seconds_of_timestamp(text: str) -> float:
    """`datetime` reads microseconds at most; the trace has a digit more."""
    return datetime.fromisoformat(f"{text[:26]}+00:00").timestamp()


def _parse(path: Path, line: int, field: str, value: Any, parse: Callable[[Any], float]) -> float:
    try:
        return parse(value)
    except (ValueError, TypeError):
        raise _broken(path, line, field, f"is {value!r}") from None


def _broken(path: Path, line: int, field: str, what: str) -> TraceError:
    return TraceError(
        f"line {line} of {path} is broken: {field} {what}", hint="repair the line, or take it out"
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
