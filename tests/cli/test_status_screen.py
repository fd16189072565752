"""A server's status as lines of a terminal."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from fastserve.cli.status_screen import clean, columns_of, format_seconds, render

SEQUENCE = {
    "id": 7,
    "request_id": "req-abc",
    "tenant": "ann",
    "priority_class": "standard",
    "state": "running",
    "level": 2,
    "place": 0,
    "prompt_tokens": 120,
    "computed_tokens": 128,
    "completion_tokens": 9,
    "max_tokens": 64,
    "age_seconds": 1.25,
    "attained_seconds": 0.5,
    "num_preemptions": 1,
    "blocks": 5,
}
ENGINE = {
    "model": "stories",
    "policy": "boost",
    "policy_spec": "boost:strength=2",
    "num_sequences": 1,
    "num_unstarted": 1,
    "blocks": {"fast": {"total": 64, "used": 16, "cached": 3}, "slow": {"total": 0, "used": 0}},
    "prefix_tokens": {"hit": 30, "miss": 70},
    "totals": {
        "prompt_tokens": 1000,
        "completion_tokens": 500,
        "completions": 10,
        "steps": 100,
        "evictions": 1,
        "swapped_blocks_in": 4,
        "swapped_blocks_out": 5,
    },
    "preemptions": {"evicted": 1, "passed_over": 2},
    "step_seconds": 0.0234,
    "sequences": [SEQUENCE],
    "recent_preemptions": [
        {"time": 998.0, "sequence_id": 3, "tenant": "bob", "reason": "evicted", "by": 7},
        {"time": 999.5, "sequence_id": 4, "tenant": "", "reason": "passed_over", "by": None},
    ],
}
STATUS: dict[str, Any] = {
    "time": 1000.0,
    "uptime_seconds": 3700.0,
    "version": "0.1.0",
    "is_draining": False,
    "num_requests": 1,
    "memory": {"resident_bytes": 812_000_000},
    "energy": {"watts": None},
    "models": [
        {
            "name": "stories",
            "aliases": [],
            "version": None,
            "state": "loaded",
            "is_pinned": True,
            "memory_bytes": 5_000_000,
            "num_requests": 1,
            "idle_seconds": None,
            "task": "generate",
            "error": None,
        }
    ],
    "model_memory": {"budget_bytes": None, "used_bytes": 5_000_000},
    "engines": [ENGINE],
    "tenants": [],
}


def changed(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(STATUS), **changes}


def with_engine(**changes: Any) -> dict[str, Any]:
    return changed(engines=[{**copy.deepcopy(ENGINE), **changes}])


def screen(status: dict[str, Any], **options: Any) -> str:
    return "\n".join(render(status, **{"width": 160, "height": 50, **options}))


def test_all_that_a_status_tells_is_on_the_screen() -> None:
    shown = screen(STATUS)
    for part in (
        "fastserve 0.1.0   up 1 h 1 min   812.0 MB in memory",
        "stories loaded, pinned, 5.0 MB, 1 request",
        "stories   policy boost:strength=2   23 ms a step",
        "1 sequence, 1 request without a turn   so far 500 tokens of 10 completions",
        "blocks [#####...............] 16 of 64, 3 cached   30 % of prompts cached",
        "preempted: evicted 1, passed over 2; blocks moved out 5, in 4",
        "2.0 s ago: sequence 3 of bob evicted for 7",
        "500 ms ago: sequence 4 passed over",
    ):
        assert part in shown, part
    header, row = [line.split() for line in shown.splitlines() if "ann" in line or "tenant " in line]
    cells = dict(
        zip(header, " ".join(row).replace("1.2 s", "1.2s").replace("500 ms", "500ms").split(), strict=True)
    )
    assert (cells["id"], cells["tenant"], cells["state"], cells["completion"]) == (
        "7",
        "ann",
        "running",
        "9/64",
    )
    assert (cells["prompt"], cells["blocks"], cells["request"]) == ("120", "5", "req-abc")


def test_what_there_was_a_second_is_told_between_two_looks() -> None:
    later = with_engine(
        totals={
            **ENGINE["totals"],
            "prompt_tokens": 1200,
            "completion_tokens": 560,
            "completions": 13,
            "steps": 140,
        }
    )
    later["time"] = 1002.0
    shown = screen(later, before=STATUS)
    assert "prompts 100 tokens/s   completions 30 tokens/s, 1.5/s" in shown


def test_an_engine_that_has_begun_anew_has_no_rates_from_before() -> None:
    later = with_engine(totals={**ENGINE["totals"], "completion_tokens": 5, "steps": 3})
    assert "so far 5 tokens" in screen({**later, "time": 1001.0}, before=STATUS)


def test_draining_energy_budgets_tenants_and_errors_are_shown_where_there_are_any() -> None:
    tenant = {
        "name": "ann",
        "weight": 2.0,
        "num_running": 3,
        "requests": 1,
        "prompt_tokens": 5,
        "completion_tokens": 70,
        "service_seconds": 12.5,
        "joules": 40.2,
        "refused": 6,
    }
    model = {**STATUS["models"][0], "name": "stories@2", "version": "2", "state": "unloaded"}
    model["error"] = "it does not fit"
    shown = screen(
        changed(
            is_draining=True,
            energy={"watts": 12.34},
            model_memory={"budget_bytes": 9_000_000, "used_bytes": 5_000_000},
            tenants=[tenant],
            models=[model],
        )
    )
    for part in (
        "12.3 W",
        "DRAINING: no new requests are taken, 1 request under way",
        " stories@2 unloaded",
        "(it does not fit)",
        "together 5.0 MB of 9.0 MB",
        "ann (weight 2) 3 running, 1 request, 70 tokens, 12.5 s of service, 40 J, 6 refused",
    ):
        assert part in shown, part


@pytest.mark.parametrize("width", [20, 40, 80, 300])
@pytest.mark.parametrize("height", [1, 5, 24])
def test_lines_fit_the_terminal(width: int, height: int) -> None:
    many = with_engine(
        sequences=[{**SEQUENCE, "id": n, "tenant": "宽" * n} for n in range(60)], num_sequences=300
    )
    lines = render(many, width=width, height=height)
    assert len(lines) <= height
    assert max(map(columns_of, lines)) <= width


def test_sequences_that_do_not_fit_are_counted() -> None:
    many = with_engine(sequences=[{**SEQUENCE, "id": n} for n in range(60)], num_sequences=300)
    lines = render(many, width=120, height=24)
    shown = [line for line in lines if "req-abc" in line]
    assert len(shown) >= 8
    assert f"  and {300 - len(shown)} more" in lines
    assert any("evicted for 7" in line for line in lines)


def test_names_that_clients_make_up_do_not_steer_the_terminal() -> None:
    evil = "\x1b[2J\x1b]0;pwned\x07\r\n\u202e"
    status = with_engine(
        sequences=[{**SEQUENCE, "tenant": evil, "request_id": evil}],
        recent_preemptions=[{**ENGINE["recent_preemptions"][0], "tenant": evil}],
    )
    for line in render(status, width=160, height=50):
        assert line.isprintable()


def test_states_are_told_apart_by_color_only_where_that_is_asked_for() -> None:
    assert "\x1b" not in screen(STATUS)
    assert "\x1b[32m" in screen(STATUS, has_colors=True)


def test_wide_and_combining_characters_take_the_columns_that_terminals_give_them() -> None:
    assert [columns_of(text) for text in ("abc", "宽窄", "e\u0301")] == [3, 4, 1]
    assert clean("宽窄宽", 5) == "宽窄…"
    assert clean("宽窄宽", 4) == "宽…"


def test_durations_are_short() -> None:
    got = [format_seconds(seconds) for seconds in (0, 0.0123, 59.94, 75, 3700, 200_000)]
    assert got == ["0 ms", "12 ms", "59.9 s", "1 min 15 s", "1 h 1 min", "2 d 7 h"]
