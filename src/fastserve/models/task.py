"""What a model is for: its task, head and labels, by its config.json and the fastserve.json beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.models.head import Head, HeadKind
from fastserve.types import JsonObject

Task = Literal[
    "generate",
    "embed",
    "text-classification",
    "pair-classification",
    "token-classification",
    "relation-extraction",
    "question-answering",
    "multiple-choice",
]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]

# The heads of transformers' classes, by what their names end in, and the task of one that says no more.
_HEADS: Mapping[str, HeadKind] = {
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
}
_TASKS: Mapping[HeadKind, tuple[Task, ...]] = {
    "sequence-classification": ("text-classification", "pair-classification", "relation-extraction"),
    "token-classification": ("token-classification",),
    "question-answering": ("question-answering",),
    "multiple-choice": ("multiple-choice",),
}
_EITHER = frozenset({"text-classification", "pair-classification"})  # a text, or two: the model takes both
_DEFAULT_NUM_LABELS = 2  # of transformers' configs, which leave out what is so
_FOR_GENERATION = ("causal-lm", "dialogue", "translation", "summarization")
_FOR_EMBEDDING = "embedding"  # as fastserve.json calls `embed`


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSettings:
    """
    Attributes:
        is_declared: fastserve.json names the task; else it follows from the architecture.
        labels: of the logits, in order; none where there is no head with labels.
        problem_type: of a head for whole texts.
        max_length: most tokens of a text that the model was trained with; None: those of its context.
        tag_scheme: of labels for tokens, such as iob2; None where nobody says.
    """

    task: Task
    head: Head | None = None
    is_declared: bool = False
    labels: tuple[str, ...] = ()
    problem_type: ProblemType = "single_label_classification"
    max_length: int | None = None
    tag_scheme: str | None = None

    def can(self, task: Task) -> bool:
        """Whether the model can be asked for a task: its own, or one that its head is made for too where
        nobody says what it was trained for.

        >>> TaskSettings(task="text-classification").can("pair-classification")
        True
        """
        if task == self.task or {task, self.task} <= _EITHER:
            return True
        return self.head is not None and not self.is_declared and task in _TASKS[self.head.kind]


GENERATE = TaskSettings(task="generate")


def read_task(config: JsonObject, card: JsonObject, *, is_decoder: bool) -> TaskSettings:
    """What a model is for.

    Args:
        config: its config.json, whose `architectures` name the head, whose `id2label` names the labels.
        card: its fastserve.json; empty where there is none.

    Raises:
        CheckpointError: a value is impossible, or the two contradict each other.
        UnsupportedError: a task that we do not have.
    """
    kind = _head_kind(config)
    task = _declared_task(card)
    if kind is None:
        if task is not None and task not in ("generate", "embed"):
            raise CheckpointError(
                f"fastserve.json says {task}, but {_architecture(config) or 'the model'} has no head for it",
                hint="take the model from its source again, all files together",
            )
        task = task or ("generate" if is_decoder else "embed")
        return TaskSettings(task=task, is_declared=bool(card.get("task")), max_length=_max_length(card))
    if task is not None and task not in _TASKS[kind]:
        raise CheckpointError(
            f"fastserve.json says {task}, but {_architecture(config)} is for {' or '.join(_TASKS[kind])}",
            hint="take the model from its source again, all files together",
        )
    labels = _labels(config)
    if kind == "multiple-choice":
        labels = ()
    elif kind == "question-answering" and len(labels) != 2:
        raise CheckpointError(
            f"the model's config has {len(labels)} labels; to find answers takes 2 logits a token"
        )
    num_labels = 1 if kind == "multiple-choice" else len(labels)
    tag_scheme = card.get("tag_scheme")
    return TaskSettings(
        task=task or _TASKS[kind][0],
        head=Head(kind, num_labels),
        is_declared=task is not None,
        labels=() if kind == "question-answering" else labels,
        problem_type=_problem_type(config, num_labels),
        max_length=_max_length(card),
        tag_scheme=None if tag_scheme is None else str(tag_scheme),
    )


def _architecture(config: JsonObject) -> str:
    architectures = config.get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else ""


def _head_kind(config: JsonObject) -> HeadKind | None:
    architecture = _architecture(config)
    return next((kind for ending, kind in _HEADS.items() if architecture.endswith(ending)), None)


def _declared_task(card: JsonObject) -> Task | None:
    task: Any = card.get("task")
    if task is None:
        return None
    if task == _FOR_EMBEDDING:
        return "embed"
    if task in get_args(Task):
        known: Task = task
        return known
    if task in _FOR_GENERATION:
        return "generate"
    raise UnsupportedError(
        f"fastserve.json says task={task!r}, which is not supported",
        hint=f"supported are {', '.join((*get_args(Task), _FOR_EMBEDDING, *_FOR_GENERATION))}",
    )


def _labels(config: JsonObject) -> tuple[str, ...]:
    """`id2label`, else as many names as transformers would give."""
    id2label = config.get("id2label")
    if id2label is None:
        num_labels = config.get("num_labels", _DEFAULT_NUM_LABELS)
        if type(num_labels) is not int or num_labels < 1:
            raise CheckpointError(f"the model's config has num_labels={num_labels!r}; the least is 1")
        return tuple(f"LABEL_{index}" for index in range(num_labels))
    if not isinstance(id2label, dict) or not id2label:
        raise CheckpointError("the model's config has an id2label that is no object of labels")
    by_id = {str(key): label for key, label in id2label.items()}
    if by_id.keys() != {str(index) for index in range(len(by_id))}:
        raise CheckpointError(
            f"the model's config has an id2label of {len(by_id)} labels that are not numbered from 0",
            hint="number them 0, 1, ... without a gap",
        )
    labels = tuple(str(by_id[str(index)]) for index in range(len(by_id)))
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise CheckpointError(f"the model's config has an id2label with the label {twice!r} more than once")
    return labels


def _problem_type(config: JsonObject, num_labels: int) -> ProblemType:
    """Of a head that does not say: as transformers' pipeline has it, one logit is a probability of its own,
    several share one."""
    found: Any = config.get("problem_type")
    if found is None:
        return "multi_label_classification" if num_labels == 1 else "single_label_classification"
    if found not in get_args(ProblemType):
        raise UnsupportedError(
            f"the model's config has problem_type={found!r}, which is not supported",
            hint=f"supported are {', '.join(get_args(ProblemType))}",
        )
    known: ProblemType = found
    return known


def _max_length(card: JsonObject) -> int | None:
    max_length = card.get("max_length")
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise CheckpointError(
            f"fastserve.json has max_length={max_length!r}; it must be a whole number of at least 1"
        )
    return max_length
