from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastserve.data.problem import PROBLEM_KINDS, ProblemLog
from fastserve.errors import DataError

GUIDE = Path(__file__).resolve().parent.parent.parent / "docs" / "guides" / "prepare.md"


def test_the_guide_has_every_kind_of_problem_with_its_actions_in_order() -> None:
    told: dict[str, tuple[str, ...]] = {}
    for line in GUIDE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        kinds = re.findall(r"`([a-z-]+)`", cells[0])
        if len(cells) == 3 and kinds and kinds[0] in PROBLEM_KINDS:
            actions = re.sub(r"\([^()]*\)", "", cells[2]).split(",")
            told |= {kind: tuple(action.strip() for action in actions) for kind in kinds}
    assert told == {kind: about.actions for kind, about in PROBLEM_KINDS.items()}


def test_what_cannot_be_repaired_is_fatal_or_dropped_as_asked() -> None:
    log = ProblemLog({"bad-label": "repair-or-drop"})
    assert log.report("bad-label", "f", 1, "x", can_repair=True) == "repair"
    assert log.report("bad-label", "f", 1, "x", can_repair=False) == "drop"
    with pytest.raises(DataError, match="f:2: x"):
        ProblemLog({"bad-label": "repair"}).report("bad-label", "f", 2, "x", can_repair=False)


def test_an_error_tells_twenty_problems_and_how_many_more_there_are() -> None:
    log = ProblemLog(raises_at_once=False)
    for line in range(1, 31):
        assert log.report("malformed", "rows.jsonl", line, "no JSON") == "error"
    with pytest.raises(DataError) as caught:
        log.raise_fatal()
    assert caught.value.message.count("no JSON") == 20
    assert "rows.jsonl:20: no JSON; and 10 more" in caught.value.message
    assert caught.value.hint == "mend the data, or choose --on-problem malformed=drop"
