"""A server's status as lines for a terminal: pure text, of the document that /admin/status gives."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from fastserve.cli.report import format_bytes

Document = Mapping[str, Any]

_LEAST_ROWS = 3  # of sequences, for an engine
_NUM_PREEMPTIONS = 3  # that are shown
_BAR_WIDTH = 20
_COLORS: Mapping[str, str] = {  # SGR parameters, by the state of a sequence
    "running": "32",
    "paused": "33",
    "slow": "35",
    "moving": "35",
    "held": "36",
    "waiting": "2",
}
_REASONS = {"evicted": "evicted", "passed_over": "passed over"}
_COLUMNS = (
    "place",
    "id",
    "tenant",
    "class",
    "state",
    "level",
    "prompt",
    "completion",
    "age",
    "service",
    "preempted",
    "blocks",
    "request",
)
_RIGHT = frozenset(_COLUMNS) - {"tenant", "class", "state", "request"}
_MOST_CELL = {"tenant": 16, "class": 12, "request": 40}  # columns of the terminal


def render(
    status: Document, *, before: Document | None = None, width: int, height: int, has_colors: bool = False
) -> list[str]:
    """Lines that fit a terminal.

    Args:
        before: an earlier status, for what there was a second since then.
        width, height: of the terminal.
        has_colors: whether states are told apart by color too.
    """
    head = [_headline(status), *_models(status), *_tenants(status), ""]
    engines = status["engines"]
    num_preemptions = [min(len(engine["recent_preemptions"]), _NUM_PREEMPTIONS) for engine in engines]
    fixed = len(head) + sum(num_preemptions) + 6 * len(engines)  # of an engine: four, a header, an empty one
    num_rows = max((height - fixed) // max(len(engines), 1), _LEAST_ROWS)
    lines = [clean(line, width) for line in head]
    for engine in engines:
        lines += [
            clean(line, width) for line in _engine(engine, _find(before, engine), _elapsed(status, before))
        ]
        lines += _sequences(engine, num_rows, width, has_colors=has_colors)
        lines += [clean(line, width) for line in _preemptions(engine, status["time"])]
        lines.append("")
    return [line.rstrip() for line in lines[:height]]


def clean(text: str, width: int) -> str:
    """What fits so many columns of it, without characters that would steer the terminal: tenants and requests
    are named by whoever asks.

    >>> clean("a\\x1b[2Jb", 80), clean("abcdef", 4)
    ('a?[2Jb', 'abc…')
    """
    text = "".join(character if character.isprintable() else "?" for character in text)
    if columns_of(text) <= width:
        return text
    kept, used = [], 0
    for character in text:
        used += _columns(character)
        if used > width - 1:
            break
        kept.append(character)
    return "".join(kept) + "…"


def columns_of(text: str) -> int:
    """How wide a terminal shows it."""
    return sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def format_seconds(seconds: float) -> str:
    """A duration, short.

    >>> [format_seconds(s) for s in (0.0123, 4.26, 75, 3700, 200_000)]
    ['12 ms', '4.3 s', '1 min 15 s', '1 h 1 min', '2 d 7 h']
    """
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    for size, name, smaller, smaller_name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if seconds >= size:
            return f"{seconds // size:.0f} {name} {seconds % size // smaller:.0f} {smaller_name}"
    raise AssertionError(seconds)


def _headline(status: Document) -> str:
    parts = [
        f"fastserve {status['version']}",
        f"up {format_seconds(status['uptime_seconds'])}",
        f"{format_bytes(status['memory']['resident_bytes'])} in memory",
    ]
    if status["energy"]["watts"] is not None:
        parts.append(f"{status['energy']['watts']:.1f} W")
    if status["is_draining"]:
        under_way = _count(status["num_requests"], "request")
        parts.append(f"DRAINING: no new requests are taken, {under_way} under way")
    return "   ".join(parts)


def _models(status: Document) -> Iterator[str]:
    shown = []
    for model in status["models"]:
        pinned = ", pinned" if model["is_pinned"] else ""
        text = f"{model['name']} {model['state']}{pinned}, {format_bytes(model['memory_bytes'])}"
        if model["num_requests"]:
            text += f", {_count(model['num_requests'], 'request')}"
        if model["error"]:
            text += f" ({model['error']})"
        shown.append(text)
    memory = status["model_memory"]
    if memory["budget_bytes"] is not None:
        shown.append(
            f"together {format_bytes(memory['used_bytes'])} of {format_bytes(memory['budget_bytes'])}"
        )
    if shown:
        yield "models   " + " | ".join(shown)


def _tenants(status: Document) -> Iterator[str]:
    shown = []
    for tenant in status["tenants"]:
        text = f"{tenant['name']} (weight {tenant['weight']:g}) {tenant['num_running']} running, "
        text += f"{_count(tenant['requests'], 'request')}, {tenant['completion_tokens']} tokens, "
        text += f"{format_seconds(tenant['service_seconds'])} of service"
        if tenant["joules"] is not None:
            text += f", {tenant['joules']:.0f} J"
        if tenant["refused"]:
            text += f", {tenant['refused']} refused"
        shown.append(text)
    if shown:
        yield "tenants  " + " | ".join(shown)


def _engine(engine: Document, before: Document | None, elapsed_seconds: float) -> Iterator[str]:
    step = (
        "no step yet"
        if engine["step_seconds"] is None
        else f"{format_seconds(engine['step_seconds'])} a step"
    )
    yield f"{engine['model']}   policy {engine['policy_spec']}   {step}"
    totals = engine["totals"]
    waiting = _count(engine["num_unstarted"], "request")
    parts = [f"{_count(engine['num_sequences'], 'sequence')}, {waiting} without a turn"]
    if before is not None and elapsed_seconds > 0:
        rates = {
            name: (totals[name] - before["totals"][name]) / elapsed_seconds
            for name in ("prompt_tokens", "completion_tokens", "completions")
        }
        parts.append(f"prompts {rates['prompt_tokens']:.0f} tokens/s")
        parts.append(f"completions {rates['completion_tokens']:.0f} tokens/s, {rates['completions']:.1f}/s")
    else:
        parts.append(
            f"so far {totals['completion_tokens']} tokens of {_count(totals['completions'], 'completion')}"
        )
    yield "  " + "   ".join(parts)
    fast, slow = engine["blocks"]["fast"], engine["blocks"]["slow"]
    memory = f"  blocks {_bar(fast['used'], fast['total'])} {fast['used']} of {fast['total']}"
    memory += f", {fast['cached']} cached"
    if slow["total"]:
        memory += f"   slow {_bar(slow['used'], slow['total'])} {slow['used']} of {slow['total']}"
    tokens = engine["prefix_tokens"]
    if sought := tokens["hit"] + tokens["miss"]:
        memory += f"   {100 * tokens['hit'] / sought:.0f} % of prompts cached"
    yield memory
    preempted = ", ".join(f"{_REASONS.get(name, name)} {num}" for name, num in engine["preemptions"].items())
    moved = f"blocks moved out {totals['swapped_blocks_out']}, in {totals['swapped_blocks_in']}"
    yield f"  preempted: {preempted}; {moved}"


def _sequences(engine: Document, num_rows: int, width: int, *, has_colors: bool) -> Iterator[str]:
    sequences = engine["sequences"]
    if not sequences:
        return
    shown = sequences if len(sequences) <= num_rows else sequences[: num_rows - 1]
    table = [
        [clean(cell, _MOST_CELL.get(name, 24)) for name, cell in zip(_COLUMNS, row, strict=True)]
        for row in (_COLUMNS, *map(_cells, shown))
    ]
    widths = [max(map(columns_of, column)) for column in zip(*table, strict=True)]
    for row, sequence in zip(table, (None, *shown), strict=True):
        cells = []
        for name, cell, column_width in zip(_COLUMNS, row, widths, strict=True):
            space = " " * (column_width - columns_of(cell))
            cells.append(space + cell if name in _RIGHT else cell + space)
        line = clean("  " + "  ".join(cells), width)
        if has_colors and sequence is not None:
            line = f"\x1b[{_COLORS.get(sequence['state'], '0')}m{line}\x1b[0m"
        yield line
    if hidden := engine["num_sequences"] - len(shown):
        yield clean(f"  and {hidden} more", width)


def _cells(sequence: Document) -> tuple[str, ...]:
    prompt = str(sequence["prompt_tokens"])
    if sequence["computed_tokens"] < sequence["prompt_tokens"]:
        prompt = f"{sequence['computed_tokens']}/{prompt}"
    return (
        str(sequence["place"]),
        str(sequence["id"]),
        sequence["tenant"] or "-",
        sequence["priority_class"],
        sequence["state"],
        str(sequence["level"]),
        prompt,
        f"{sequence['completion_tokens']}/{sequence['max_tokens']}",
        format_seconds(sequence["age_seconds"]),
        format_seconds(sequence["attained_seconds"]),
        str(sequence["num_preemptions"]),
        str(sequence["blocks"]),
        sequence["request_id"],
    )


def _preemptions(engine: Document, now: float) -> Iterator[str]:
    for preemption in reversed(engine["recent_preemptions"][-_NUM_PREEMPTIONS:]):
        tenant = f" of {preemption['tenant']}" if preemption["tenant"] else ""
        by = "" if preemption["by"] is None else f" for {preemption['by']}"
        ago = format_seconds(max(now - preemption["time"], 0.0))
        reason = _REASONS.get(preemption["reason"], preemption["reason"])
        yield f"  {ago} ago: sequence {preemption['sequence_id']}{tenant} {reason}{by}"


def _find(status: Document | None, engine: Document) -> Document | None:
    """The same engine in another status; None where it was not there, or has begun anew since then."""
    for other in () if status is None else status["engines"]:
        if other["model"] == engine["model"] and other["totals"]["steps"] <= engine["totals"]["steps"]:
            found: Document = other
            return found
    return None


def _elapsed(status: Document, before: Document | None) -> float:
    return 0.0 if before is None else float(status["time"] - before["time"])


def _bar(used: int, total: int) -> str:
    filled = round(_BAR_WIDTH * used / total) if total else 0
    return f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}]"


def _count(num: int, noun: str) -> str:
    return f"{num} {noun}" if num == 1 else f"{num} {noun}s"
