"""What is wrong with data: kinds of problems, what is done about each, and the log of those that were found.

Nothing is absorbed: whatever is repaired, dropped or kept is a `Problem` with file and line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fastserve.errors import DataError, OptionError
from fastserve.option import check_choice

ERROR = "error"
REPAIR = "repair"
DROP = "drop"
KEEP = "keep"
REPAIR_OR_DROP = "repair-or-drop"
ACTIONS = (ERROR, REPAIR, DROP, KEEP, REPAIR_OR_DROP)


@dataclass(frozen=True, slots=True)
class ProblemKind:
    """What may be done about a kind of problem; the first of `actions` is what is done unless told otherwise.

    `repair` says what a repair does, where there is one. What has both repair and drop has repair-or-drop
    too: what cannot be repaired is dropped, where repair alone finds it fatal.
    """

    actions: tuple[str, ...]
    meaning: str
    repair: str = ""


PROBLEM_KINDS: dict[str, ProblemKind] = {
    "bom": ProblemKind((REPAIR, ERROR), "a byte order mark, at the start of a file or within", "taken out"),
    "encoding": ProblemKind(
        (REPAIR, ERROR), "a file that is not UTF-8", "read in the encoding that is detected, which is named"
    ),
    "bad-bytes": ProblemKind(
        (ERROR, REPAIR, DROP), "bytes that the encoding does not have", "U+FFFD in their place"
    ),
    "malformed": ProblemKind((ERROR, DROP), "a line that is no row: broken JSON, cells too few or too many"),
    "missing-field": ProblemKind((ERROR, DROP), "a field that the task needs is absent or of another type"),
    "empty-row": ProblemKind((DROP, ERROR), "a row without text, or an empty line where a row should be"),
    "bad-label": ProblemKind(
        (ERROR, REPAIR, DROP),
        "a label that is empty, of another type than the others, or not among those named",
        "the label named that differs in case or space alone",
    ),
    "bad-tag": ProblemKind(
        (ERROR, REPAIR, DROP),
        "a tag, or a sequence of tags, that its scheme does not have",
        "read as evaluation scripts do: an entity begins where none goes on",
    ),
    "mixed-tag-scheme": ProblemKind(
        (ERROR, REPAIR),
        "a file whose tags are not all of one scheme",
        "each sequence read for itself and written in one scheme",
    ),
    "joined-entities": ProblemKind((ERROR, KEEP, DROP), "neighbours of one label, which IO cannot part"),
    "blank-token": ProblemKind(
        (ERROR, REPAIR, DROP), "a token that is empty or space", "taken out, and what is told by index moved"
    ),
    "length-mismatch": ProblemKind(
        (ERROR, DROP), "tokens and tags, or parallel files, that differ in number"
    ),
    "duplicate-id": ProblemKind(
        (ERROR, REPAIR, DROP), "an id that an earlier row has", "-2, -3, ... put behind it"
    ),
    "answer-offset": ProblemKind(
        (ERROR, REPAIR, DROP),
        "an answer that is not in its context where it should begin",
        "the nearest place of the same text; an answer that is nowhere goes where others are left",
    ),
    "bad-span": ProblemKind(
        (ERROR, REPAIR, DROP),
        "an entity or argument that is empty, outside of its text, or overlaps another",
        "space at its ends left out; of two that overlap, the longer kept",
    ),
    "bad-role": ProblemKind((ERROR, DROP), "a message whose role is not known, or out of turn"),
    "conflicting-label": ProblemKind((KEEP, ERROR, DROP), "a text that an earlier row labels otherwise"),
    "duplicate": ProblemKind((DROP, ERROR, KEEP), "a row that equals an earlier one"),
    "near-duplicate": ProblemKind((DROP, ERROR, KEEP), "a row that is almost an earlier one"),
    "too-short": ProblemKind((DROP, ERROR), "a text shorter than --min-length"),
    "too-long": ProblemKind((DROP, ERROR), "a text longer than --max-length"),
    "ratio": ProblemKind((DROP, ERROR), "source and target whose lengths differ by more than --max-ratio"),
    "unseen-label": ProblemKind((ERROR, DROP, KEEP), "a label of dev or test that training does not have"),
    "split-overlap": ProblemKind(
        (ERROR, DROP, KEEP), "a text of dev or test that is in training too; the training row is dropped"
    ),
}
"""Every kind of problem by name, in the order in which they are met."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem. `action` is what was done about it.

    >>> print(Problem("bad-label", "train.jsonl", 7, "label '' is empty", "drop"))
    train.jsonl:7: label '' is empty [bad-label: drop]
    """

    kind: str
    file: str
    line: int
    message: str
    action: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message} [{self.kind}: {self.action}]"

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}" if self.file else f"row {self.line}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_MAX_FATAL = 20  # problems that an error tells; a file of another kind than was said has one in every line


class ProblemLog:
    """Decides what is done about each problem, counts them, and hands them on.

    `notes` counts choices that were made for the user, by what they say. `on_problem` overrides the first
    action of a kind; `sink` is given every problem as it is met. Fatal ones are raised at once with
    `raises_at_once`, or else kept for `raise_fatal`, so that one run finds several.

    >>> log = ProblemLog({"bad-label": "drop"})
    >>> log.report("bad-label", "train.jsonl", 7, "label '' is empty")
    'drop'

    Raises:
        OptionError: a kind or an action is unknown, or the kind does not have that action.
    """

    def __init__(
        self,
        on_problem: Mapping[str, str] | None = None,
        *,
        sink: Callable[[Problem], None] | None = None,
        raises_at_once: bool = True,
    ) -> None:
        self._actions = {kind: about.actions[0] for kind, about in PROBLEM_KINDS.items()}
        for kind, action in (on_problem or {}).items():
            check_choice("on_problem", kind, tuple(PROBLEM_KINDS))
            check_choice("on_problem", action, ACTIONS)
            allowed = PROBLEM_KINDS[kind].actions
            if {REPAIR, DROP} <= set(allowed):
                allowed = (*allowed, REPAIR_OR_DROP)
            if action not in allowed:
                raise OptionError(
                    f"on_problem: {kind} cannot be answered by {action!r}",
                    hint=f"choose one of {', '.join(allowed)}",
                    option="on_problem",
                )
            self._actions[kind] = action
        self._sink = sink
        self._raises_at_once = raises_at_once
        self._fatal: list[Problem] = []
        self.counts: Counter[tuple[str, str]] = Counter()
        self.notes: Counter[str] = Counter()

    def action_for(self, kind: str) -> str:
        return self._actions[kind]

    def report(self, kind: str, file: str, line: int, message: str, *, can_repair: bool = True) -> str:
        """Take note of a problem; returns what to do about it. What cannot be repaired is fatal instead.

        A fatal problem gives `error` where it is kept for `raise_fatal`: leave its row out, and go on.

        Raises:
            DataError: the problem is fatal, and the log raises at once.
        """
        action = self._actions[kind]
        if action == REPAIR_OR_DROP:
            action = REPAIR if can_repair else DROP
        elif action == REPAIR and not can_repair:
            action = ERROR
        problem = Problem(kind, file, line, message, action)
        self.counts[kind, action] += 1
        if self._sink is not None:
            self._sink(problem)
        if action == ERROR:
            if len(self._fatal) < _MAX_FATAL:
                self._fatal.append(problem)
            if self._raises_at_once:
                self.raise_fatal()
        return action

    def note(self, text: str) -> None:
        """Take note of a choice that was made for the user, by what it says; nothing is wrong."""
        self.notes[text] += 1

    def count(self, kind: str, action: str | None = None) -> int:
        """How often a kind was met, or was met and answered by one action."""
        return sum(
            number
            for (other, done), number in self.counts.items()
            if other == kind and action in (None, done)
        )

    def raise_fatal(self) -> None:
        """Raise a DataError that tells the fatal problems so far, if there are any."""
        if not self._fatal:
            return
        number = sum(number for (_, action), number in self.counts.items() if action == ERROR)
        told = "; ".join(f"{problem.place}: {problem.message}" for problem in self._fatal)
        more = f"; and {number - len(self._fatal)} more" if number > len(self._fatal) else ""
        kinds = dict.fromkeys(problem.kind for problem in self._fatal)
        remedies = [
            f"{kind}={other}" for kind in kinds for other in PROBLEM_KINDS[kind].actions if other != ERROR
        ]
        choice = f", or choose --on-problem {' or '.join(remedies)}" if remedies else ""
        raise DataError(f"{told}{more}", hint=f"mend the data{choice}")
