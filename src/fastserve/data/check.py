"""Whether a row has what its task needs: fields, types, offsets, roles. Each finding is a problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastserve.data.problem import DROP, ERROR, REPAIR, ProblemLog
from fastserve.data.row import FIELDS, Row, take_tokens_out

_ROLES = ("system", "user", "assistant", "tool")
_OUT = (ERROR, DROP)


class RowChecker:
    """Checks rows of one task, in the order in which they come.

    `labels` are all that there may be; without them, labels are to be of one type.
    """

    def __init__(self, task: str, log: ProblemLog, labels: Sequence[str] | None = None) -> None:
        self._task = task
        self._log = log
        self._labels = None if labels is None else set(labels)
        self._folded = {label.strip().casefold(): label for label in labels or ()}
        self._label_type: type | None = None

    def check(self, row: Row) -> Row | None:
        """The row, repaired where it must and may be; None where it is left out.

        Raises:
            DataError: a problem is fatal, and the log raises at once.
        """
        fields = _Fields(row, self._log)
        wanted = self._wanted(fields)
        if wanted is None:
            return None
        for check in _CHECKS[self._task]:
            if not check(fields, wanted):
                return None
        if self._task == "multiple-choice":
            return row if _has_choice(fields) else None
        if "label" in wanted and not self._check_label(fields, "label"):
            return None
        if "labels" in wanted and not self._check_labels(fields):
            return None
        if "entities" in wanted and not self._check_entity_labels(fields):
            return None
        return row

    def _wanted(self, fields: _Fields) -> tuple[str, ...] | None:
        """The alternative of the task's fields that a row has."""
        alternatives = FIELDS[self._task]
        for names in alternatives:
            if all(name in fields.row for name in names):
                return names
        nearest = min(alternatives, key=lambda names: sum(name not in fields.row for name in names))
        absent = [name for name in nearest if name not in fields.row]
        there = ", ".join(list(fields.row)[:8]) or "none"
        fields.report(
            "missing-field", f"no field {absent[0]!r}, which {self._task} needs; there are: {there}"
        )
        return None

    def _check_label(self, fields: _Fields, name: str) -> bool:
        label = self._known_label(fields, fields.row[name])
        if label is None:
            return False
        fields.row[name] = label
        return True

    def _check_labels(self, fields: _Fields) -> bool:
        labels = fields.row["labels"]
        if not isinstance(labels, list):
            return fields.report("missing-field", f"field 'labels' is no list: {_shown(labels)}")
        known = [self._known_label(fields, label) for label in labels]
        if None in known:
            return False
        fields.row["labels"] = list(dict.fromkeys(known))
        return True

    def _check_entity_labels(self, fields: _Fields) -> bool:
        for entity in fields.row["entities"]:
            label = self._known_label(fields, entity["label"])
            if label is None:
                return False
            entity["label"] = label
        return True

    def _known_label(self, fields: _Fields, label: Any) -> Any:
        """The label, or what it is repaired to; None where its row is left out."""
        if message := self._wrong_label(label):
            repaired = self._folded.get(label.strip().casefold()) if isinstance(label, str) else None
            if repaired is None and isinstance(label, str) and self._labels is None:
                repaired = label.strip() or None
            action = fields.log.report(
                "bad-label", fields.row.file, fields.row.line, message, can_repair=repaired is not None
            )
            return repaired if action == REPAIR else None
        if self._label_type is None:
            self._label_type = _type_of(label)
        return label

    def _wrong_label(self, label: Any) -> str | None:
        if isinstance(label, bool) or not isinstance(label, str | int | float):
            return f"label {_shown(label)} is neither text nor a number"
        if isinstance(label, float) and not math.isfinite(label):
            return f"label {label} is no finite number"
        if isinstance(label, str) and not label.strip():
            return f"label {label!r} is empty"
        if self._labels is not None:
            return None if label in self._labels else f"label {_shown(label)} is none of those named"
        if isinstance(label, str) and label != label.strip():
            return f"label {label!r} has space around it"
        if self._label_type is not None and _type_of(label) is not self._label_type:
            kind = "a number" if self._label_type is float else "text"
            return f"label {_shown(label)} is not {kind}, as the labels before are"
        return None


def _type_of(label: object) -> type:
    return str if isinstance(label, str) else float


class _Fields:
    """A row under check."""

    def __init__(self, row: Row, log: ProblemLog) -> None:
        self.row = row
        self.log = log

    def report(self, kind: str, message: str, *, can_repair: bool = False) -> bool:
        """Report a problem; whether its row stays."""
        return self.log.report(kind, self.row.file, self.row.line, message, can_repair=can_repair) not in _OUT

    def has_text(self, name: str) -> bool:
        value = self.row[name]
        if not isinstance(value, str):
            return self.report("missing-field", f"field {name!r} is no text: {_shown(value)}")
        if not value.strip():
            return self.report("empty-row", f"field {name!r} is empty")
        return True


_Check = Callable[[_Fields, Sequence[str]], bool]


def _has_texts(fields: _Fields, wanted: Sequence[str]) -> bool:
    names = ("text", "text_pair", "context", "question", "source", "target")
    return all(fields.has_text(name) for name in names if name in wanted)


def _has_tokens(fields: _Fields, wanted: Sequence[str]) -> bool:
    if "tokens" not in wanted:
        return True
    row = fields.row
    for name in ("tokens", "tags"):
        if name not in wanted:
            continue
        if not isinstance(row[name], list) or not all(isinstance(item, str) for item in row[name]):
            return fields.report("missing-field", f"field {name!r} is no list of texts: {_shown(row[name])}")
    if not row["tokens"]:
        return fields.report("empty-row", "there are no tokens")
    if "tags" in wanted and len(row["tokens"]) != len(row["tags"]):
        message = f"{len(row['tokens'])} tokens and {len(row['tags'])} tags"
        return fields.report("length-mismatch", message)
    blank = [index for index, token in enumerate(row["tokens"]) if not token.strip()]
    if blank:
        can_repair = len(blank) < len(row["tokens"])
        if not fields.report("blank-token", f"token {blank[0]} is blank", can_repair=can_repair):
            return False
        take_tokens_out(row, blank)
    return True


def _has_entities(fields: _Fields, wanted: Sequence[str]) -> bool:
    """Entities of a text, by their start; ends are exclusive."""
    if "entities" not in wanted:
        return True
    row = fields.row
    entities = row["entities"]
    if not isinstance(entities, list) or not all(_is_span(entity, "label") for entity in entities):
        message = f"field 'entities' is no list of {{'start', 'end', 'label'}}: {_shown(entities)}"
        return fields.report("missing-field", message)
    kept: list[dict[str, Any]] = []
    for entity in sorted(entities, key=lambda entity: (entity["start"], -entity["end"])):
        mended = _mend_span(fields, entity, row["text"], f"entity {entity['label']!r}")
        if mended is None:
            return False
        if kept and mended["start"] < kept[-1]["end"]:
            message = f"entity {_spot(mended)} overlaps entity {_spot(kept[-1])}"
            if not fields.report("bad-span", message, can_repair=True):
                return False
            kept[-1] = max(kept[-1], mended, key=lambda span: int(span["end"] - span["start"]))
        else:
            kept.append(mended)
    row["entities"] = kept
    return True


def _has_arguments(fields: _Fields, wanted: Sequence[str]) -> bool:
    row = fields.row
    for name in ("head", "tail"):
        if not _is_span(row[name]):
            message = f"field {name!r} is no {{'start', 'end'}}: {_shown(row[name])}"
            return fields.report("missing-field", message)
        text = row["text"] if "text" in wanted else row["tokens"]
        mended = _mend_span(fields, row[name], text, name)
        if mended is None:
            return False
        row[name] = mended
    if row["head"]["start"] < row["tail"]["end"] and row["tail"]["start"] < row["head"]["end"]:
        message = f"head {_spot(row['head'])} overlaps tail {_spot(row['tail'])}"
        return fields.report("bad-span", message)
    return True


def _mend_span(
    fields: _Fields, span: Mapping[str, Any], text: str | list[str], what: str
) -> dict[str, Any] | None:
    """The span without space at its ends; None where its row is left out."""
    start, end = span["start"], span["end"]
    if not 0 <= start < end <= len(text):
        unit = "characters" if isinstance(text, str) else "tokens"
        message = f"{what} {_spot(span)} is empty, or outside of {len(text)} {unit}"
        fields.report("bad-span", message)
        return None
    inside = text[start:end]
    if isinstance(inside, str):
        named = span.get("text")
        if isinstance(named, str) and named != inside:
            return _move_span(fields, span, str(text), what)
        if inside != inside.strip():
            can_repair = bool(inside.strip())
            message = f"{what} {_spot(span)} begins or ends with space: {inside!r}"
            if not fields.report("bad-span", message, can_repair=can_repair):
                return None
            start += len(inside) - len(inside.lstrip())
            end -= len(inside) - len(inside.rstrip())
    return {**span, "start": start, "end": end}


def _move_span(fields: _Fields, span: Mapping[str, Any], text: str, what: str) -> dict[str, Any] | None:
    """The span where its own text stands nearest; None where its row is left out."""
    named = span["text"]
    place = find_nearest(text, named, span["start"])
    message = f"{what} {_spot(span)} is {text[span['start'] : span['end']]!r}, not {named!r}"
    if not fields.report("bad-span", message, can_repair=place is not None) or place is None:
        return None
    return {**span, "start": place, "end": place + len(named)}


def _has_answers(fields: _Fields, wanted: Sequence[str]) -> bool:
    """Answers by their texts and where they begin in the context; none means that there is none."""
    row = fields.row
    answers = row["answers"]
    if not isinstance(answers, Mapping) or not all(
        isinstance(answers.get(name), list) for name in ("text", "answer_start")
    ):
        message = f"field 'answers' is no {{'text': [...], 'answer_start': [...]}}: {_shown(answers)}"
        return fields.report("missing-field", message)
    texts, starts = answers["text"], answers["answer_start"]
    if len(texts) != len(starts):
        return fields.report("length-mismatch", f"{len(texts)} texts and {len(starts)} starts of answers")
    places = []
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or isinstance(start, bool) or not isinstance(start, int):
            message = f"an answer is a text and a whole number, not {_shown((text, start))}"
            return fields.report("missing-field", message)
        places.append((text, start, _find_answer(row["context"], text, start)))
    mended: dict[str, list[Any]] = {"text": [], "answer_start": []}
    is_any_left = any(place is not None for _, _, place in places)
    for text, start, place in places:
        if place != start and not _report_offset(fields, text, start, place, can_repair=is_any_left):
            return False
        if place is not None:
            mended["text"].append(text)
            mended["answer_start"].append(place)
    row["answers"] = mended
    return True


def _find_answer(context: str, text: str, start: int) -> int | None:
    """Where an answer begins: at its start, or else as near as may be; None where it is nowhere."""
    if not text.strip():
        return None
    if start >= 0 and context.startswith(text, start):
        return start
    return find_nearest(context, text, start)


def _report_offset(fields: _Fields, text: str, start: int, place: int | None, *, can_repair: bool) -> bool:
    """Report that an answer is not where it should begin; whether its row stays."""
    context = fields.row["context"]
    name = f" of question {fields.row['id']!r}" if "id" in fields.row else ""
    there = context[max(start, 0) : max(start, 0) + len(text)]
    where = f"it is at {place}" if place is not None else "it is nowhere"
    message = f"answer {_shown(text)}{name} is not at {start}, where {_shown(there)} is; {where}"
    return fields.report("answer-offset", message, can_repair=can_repair)


def find_nearest(text: str, part: str, start: int) -> int | None:
    """Where `part` stands in `text`, as near to `start` as may be, the earlier of two; None where nowhere.

    >>> find_nearest("a b a", "a", 3)
    4
    """
    before = text.rfind(part, 0, max(start, 0) + len(part))
    after = text.find(part, max(start, 0))
    places = [place for place in (before, after) if place >= 0]
    return min(places, key=lambda place: abs(place - start), default=None)


def _has_choice(fields: _Fields) -> bool:
    row = fields.row
    choices, label = row["choices"], row["label"]
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        return fields.report("missing-field", f"field 'choices' is no list of texts: {_shown(choices)}")
    if len(choices) < 2 or not all(choice.strip() for choice in choices):
        return fields.report("missing-field", f"two choices at least, none of them empty: {_shown(choices)}")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
        return fields.report("bad-label", f"label {_shown(label)} is none of {len(choices)} choices")
    return True


def _has_messages(fields: _Fields, wanted: Sequence[str]) -> bool:
    """Messages of known roles, a system's first if at all, one of the assistant's at least."""
    if "messages" not in wanted:
        return True
    messages = fields.row["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    ):
        return fields.report("missing-field", "field 'messages' is no list of {'role', 'content'}")
    for index, message in enumerate(messages):
        role, content = message["role"], message.get("content")
        if role not in _ROLES:
            return fields.report("bad-role", f"role {role!r} is none of {', '.join(_ROLES)}")
        if role == "system" and index > 0:
            return fields.report("bad-role", f"message {index} is of the system, whose place is the first")
        if content is None and message.get("tool_calls"):
            message["content"] = ""
        elif not isinstance(content, str):
            return fields.report("missing-field", f"message {index} has no text: {_shown(content)}")
        elif not content.strip() and not message.get("tool_calls"):
            return fields.report("empty-row", f"message {index} is empty")
    if not any(message["role"] == "assistant" for message in messages):
        return fields.report("missing-field", "no message is of the assistant, so there is nothing to learn")
    return True


def _is_span(value: Any, *more: str) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), int) and value[name] is not True for name in ("start", "end"))
        and all(name in value for name in more)
    )


def _spot(span: Mapping[str, Any]) -> str:
    return f"[{span['start']}, {span['end']})"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_CHECKS: dict[str, tuple[_Check, ...]] = {
    "text-classification": (_has_texts,),
    "pair-classification": (_has_texts,),
    "token-classification": (_has_texts, _has_tokens, _has_entities),
    "relation-extraction": (_has_texts, _has_tokens, _has_arguments),
    "question-answering": (_has_texts, _has_answers),
    "multiple-choice": (_has_texts,),
    "embedding": (_has_texts,),
    "translation": (_has_texts,),
    "summarization": (_has_texts,),
    "dialogue": (_has_messages,),
    "causal-lm": (_has_texts, _has_messages),
}
