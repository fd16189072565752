"""Fields by other names and in other shapes, as published sets have them, brought to what tasks need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastserve.data.problem import ProblemLog
from fastserve.data.reader.marked import take_marks
from fastserve.data.reader.option import ReadOptions
from fastserve.data.row import FIELDS, Row

_TEXT = ("sentence", "content", "review", "query", "utterance", "comment", "tweet", "body")
_LABEL = ("category", "class", "intent", "sentiment", "topic", "target")
_FIRST = ("sentence1", "premise", "question1", "text1", "text_a", "anchor")
_SECOND = ("sentence2", "hypothesis", "question2", "text2", "text_b", "positive")
_SUMMARY = ("summary", "highlights", "abstract", "tldr", "title")

_OTHER_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "text-classification": {"text": _TEXT, "label": _LABEL},
    "pair-classification": {
        "text": _FIRST,
        "text_pair": _SECOND,
        "label": ("score", "similarity", "gold_label", "is_duplicate"),
    },
    "token-classification": {"tokens": ("words",), "tags": ("ner_tags", "labels")},
    "relation-extraction": {"text": ("sentence",), "tokens": ("token",), "label": ("relation",)},
    "question-answering": {"context": ("passage", "paragraph")},
    "multiple-choice": {
        "question": ("query", "stem"),
        "choices": ("options", "endings", "choice"),
        "label": ("answer", "answerKey", "gold"),
    },
    "embedding": {"text": _FIRST, "text_pair": _SECOND},
    "translation": {"source": ("src",), "target": ("tgt", "translation")},
    "summarization": {"source": ("article", "document", "text"), "target": _SUMMARY},
    "dialogue": {"messages": ("dialogue", "turns")},
    "causal-lm": {"text": ("content", "document", "body")},
}
"""What published sets call the fields of a task, by field. One is used where the field is absent and no other
of its names is there."""

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


def known_names(task: str | None) -> set[str]:
    """Every name that a header may give to a field of the task, or of any task."""
    tasks = FIELDS if task is None else [task]
    names = {"id"}
    for known in tasks:
        names.update(*FIELDS[known])
        for others in _OTHER_NAMES[known].values():
            names.update(others)
    return names


def to_task(row: Row, task: str, options: ReadOptions, log: ProblemLog) -> Row:
    """The row with the fields of its task; what it has besides stays. Whether it is in order is for
    `check_row`."""
    fields = dict(row)
    for name, other in options.fields.items():
        if other in fields:
            fields[name] = fields.pop(other)
    if options.label is not None:
        fields["label"] = options.label
    for name, others in _OTHER_NAMES[task].items():
        present = [other for other in others if other in fields]
        if name not in fields and len(present) == 1:
            fields[name] = fields.pop(present[0])
            log.note(f"{row.file}: field {present[0]!r} is read as {name!r}")
    _join_fragments(fields)
    if convert := _SHAPES.get(task):
        convert(fields, options)
    return row.with_fields(fields)


def _join_fragments(fields: dict[str, Any]) -> None:
    """Text in fragments, some of them entities: {"data": [{"text", "entity"}, ...]} of SNIPS."""
    fragments = fields.get("data")
    if "text" in fields or not isinstance(fragments, list) or not fragments:
        return
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in fragments):
        return
    text = ""
    entities = []
    for part in fragments:
        if "entity" in part:
            end = len(text) + len(part["text"])
            entities.append({"start": len(text), "end": end, "label": part["entity"]})
        text += part["text"]
    del fields["data"]
    fields |= {"text": text, "entities": entities}


def _labels(fields: dict[str, Any], options: ReadOptions) -> None:
    """Several labels in one cell are split."""
    if isinstance(fields.get("labels"), str) and "label" not in fields:
        parts = fields["labels"].split(options.label_separator)
        fields["labels"] = [part.strip() for part in parts if part.strip()]


def _tags(fields: dict[str, Any], options: ReadOptions) -> None:
    """Tokens and tags in one cell each are split at spaces."""
    for name in ("tokens", "tags"):
        if isinstance(fields.get(name), str):
            fields[name] = fields[name].split()


def _arguments(fields: dict[str, Any], options: ReadOptions) -> None:
    """Marks in the text, or FewRel's `h` and `t`: [name, id, [indexes of the first mention, ...]]."""
    for name, short in (("head", "h"), ("tail", "t")):
        if name not in fields and isinstance(fields.get(short), list) and len(fields[short]) == 3:
            mentions = fields.pop(short)[2]
            if mentions and mentions[0]:
                fields[name] = {"start": mentions[0][0], "end": mentions[0][-1] + 1}
    if isinstance(fields.get("text"), str) and "head" not in fields and "<e1>" in fields["text"]:
        text, spans = take_marks(fields["text"])
        if spans.keys() == {"e1", "e2"}:
            fields |= {"text": text, "head": spans["e1"], "tail": spans["e2"]}


def _answers(fields: dict[str, Any], options: ReadOptions) -> None:
    """A list of answers becomes the lists of their texts and starts."""
    answers = fields.get("answers")
    if answers is None and fields.get("is_impossible") is True:
        answers = []
    if isinstance(answers, list) and all(isinstance(answer, Mapping) for answer in answers):
        fields["answers"] = {
            "text": [answer.get("text") for answer in answers],
            "answer_start": [answer.get("answer_start") for answer in answers],
        }


def _choices(fields: dict[str, Any], options: ReadOptions) -> None:
    """ARC's {"text": [...], "label": [...]} becomes a list; a letter, or a choice itself, its index."""
    choices, label = fields.get("choices"), fields.get("label")
    names: list[Any] | None = None
    if isinstance(choices, Mapping) and isinstance(choices.get("text"), list):
        names = choices.get("label")
        choices = fields["choices"] = choices["text"]
    if not isinstance(choices, list) or not isinstance(label, str):
        return
    label = label.strip()
    for known in (names, choices, "ABCDEFGHIJ"[: len(choices)], [str(i) for i in range(len(choices))]):
        if known is not None and label in list(known):
            fields["label"] = list(known).index(label)
            return


def _summary(fields: dict[str, Any], options: ReadOptions) -> None:
    """Sentences of a source are joined; of several targets the first is it, all are `references`."""
    if _is_texts(fields.get("source")):
        fields["source"] = " ".join(fields["source"])
    if _is_texts(fields.get("target")):
        fields["references"] = fields["target"]
        fields["target"] = fields["target"][0]


def _messages(fields: dict[str, Any], options: ReadOptions) -> None:
    """ShareGPT's `conversations`, an instruction with its output, or a prompt with its completion, become
    messages; speakers become roles."""
    if "messages" not in fields:
        if isinstance(fields.get("conversations"), list):
            fields["messages"] = fields.pop("conversations")
        elif isinstance(fields.get("instruction"), str) and isinstance(fields.get("output"), str):
            wanted = [fields.pop("instruction"), fields.pop("input", None)]
            prompt = "\n\n".join(text for text in wanted if text)
            fields["messages"] = _exchange(prompt, fields.pop("output"))
        else:
            for answer in ("completion", "response"):
                if isinstance(fields.get("prompt"), str) and isinstance(fields.get(answer), str):
                    fields["messages"] = _exchange(fields.pop("prompt"), fields.pop(answer))
    if isinstance(fields.get("messages"), list):
        fields["messages"] = [_message(message, options) for message in fields["messages"]]


def _exchange(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _message(message: Any, options: ReadOptions) -> Any:
    if not isinstance(message, Mapping):
        return message
    fields = dict(message)
    for name, other in (("role", "from"), ("content", "value")):
        if name not in fields and other in fields:
            fields[name] = fields.pop(other)
    role = fields.get("role")
    if isinstance(role, str):
        fields["role"] = options.roles.get(role) or _SPEAKERS.get(role, role)
    return fields


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


_SHAPES: dict[str, Callable[[dict[str, Any], ReadOptions], None]] = {
    "text-classification": _labels,
    "token-classification": _tags,
    "relation-extraction": _arguments,
    "question-answering": _answers,
    "multiple-choice": _choices,
    "summarization": _summary,
    "dialogue": _messages,
    "causal-lm": _messages,
}
