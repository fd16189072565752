"""The tasks by name: made from training rows, or read again from a model directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from fastserve.checkpoint.file import read_json, read_optional_json
from fastserve.engine.task.classification import MARKERS
from fastserve.errors import CheckpointError, OptionError, UnsupportedError
from fastserve.evaluate.task.embedding import Embedding
from fastserve.evaluate.task.generation import Generation, GenerationName
from fastserve.evaluate.task.multiple_choice import MultipleChoice
from fastserve.evaluate.task.question_answering import QuestionAnswering
from fastserve.evaluate.task.relation_extraction import RelationExtraction
from fastserve.evaluate.task.task import Row, Task
from fastserve.evaluate.task.text_classification import Problem, TextClassification
from fastserve.evaluate.task.token_classification import TokenClassification
from fastserve.option import check_choice
from fastserve.types import JsonObject

SETTINGS_FILE = "fastserve.json"
DEFAULT_STRIDE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """What a task can be told besides its rows.

    Attributes:
        max_length: most tokens of an example.
        stride: tokens that neighbouring windows of a long text share.
        problem: of text classification; None sees it from the labels.
        instruction: before the source of a translation or summary; None is the task's own.
        is_encoder_decoder: whether the model is one.
        decoder_start: the token that such a model's decoder begins with; None is the pad token.
    """

    max_length: int
    stride: int = DEFAULT_STRIDE
    problem: Problem | None = None
    instruction: str | None = None
    is_encoder_decoder: bool = False
    decoder_start: int | None = None


def _text_classification(rows: Seq[Row], options: TaskOptions) -> Task:
    return TextClassification.from_rows(
        rows, max_length=options.max_length, is_pair=False, problem=options.problem
    )


def _pair_classification(rows: Seq[Row], options: TaskOptions) -> Task:
    return TextClassification.from_rows(
        rows, max_length=options.max_length, is_pair=True, problem=options.problem
    )


def _token_classification(rows: Seq[Row], options: TaskOptions) -> Task:
    return TokenClassification.from_rows(rows, max_length=options.max_length, stride=options.stride)


def _relation_extraction(rows: Seq[Row], options: TaskOptions) -> Task:
    return RelationExtraction.from_rows(rows, max_length=options.max_length)


def _question_answering(rows: Seq[Row], options: TaskOptions) -> Task:
    return QuestionAnswering(max_length=options.max_length, stride=options.stride)


def _multiple_choice(rows: Seq[Row], options: TaskOptions) -> Task:
    return MultipleChoice(max_length=options.max_length)


def _embedding(rows: Seq[Row], options: TaskOptions) -> Task:
    return Embedding.from_rows(rows, max_length=options.max_length)


def _generation(name: GenerationName) -> Callable[[Seq[Row], TaskOptions], Task]:
    def make(rows: Seq[Row], options: TaskOptions) -> Task:
        return Generation(
            name=name,
            max_length=options.max_length,
            instruction=options.instruction,
            is_encoder_decoder=options.is_encoder_decoder,
            decoder_start=options.decoder_start,
        )

    return make


_MAKERS: Mapping[str, Callable[[Seq[Row], TaskOptions], Task]] = {
    "text-classification": _text_classification,
    "pair-classification": _pair_classification,
    "token-classification": _token_classification,
    "relation-extraction": _relation_extraction,
    "question-answering": _question_answering,
    "multiple-choice": _multiple_choice,
    "embedding": _embedding,
    **{name: _generation(name) for name in get_args(GenerationName)},
}

TASK_NAMES = tuple(_MAKERS)


def make_task(name: str, rows: Seq[Row], options: TaskOptions) -> Task:
    """The task that training rows pose.

    Raises:
        OptionError: no task has that name.
        DataError: the rows are not of it.
    """
    check_choice("task", name, TASK_NAMES)
    return _MAKERS[name](rows, options)


def check_metric(task: Task, metric: str) -> None:
    """Raise OptionError, before anything is trained, where a task does not give a metric of that name."""
    if metric not in task.metrics:
        raise OptionError(
            f"metric={metric!r} is none of {task.name}",
            hint=f"choose one of {', '.join(task.metrics)}",
            option="metric",
        )


def task_of_folder(folder: Path) -> Task:
    """The task of a model directory that `fastserve tune` wrote, or whose config names a head.

    Raises:
        CheckpointError: the folder has no config.
        UnsupportedError: its task is none that can be evaluated.
    """
    config = read_json(folder / "config.json")
    settings = read_optional_json(folder / SETTINGS_FILE)
    name = settings.get("task") or _task_of_architecture(config)
    labels = _labels(folder, config)
    max_length = int(settings.get("max_length") or min(512, config.get("max_position_embeddings", 512)))
    stride = int(settings.get("stride", DEFAULT_STRIDE))
    match name:
        case "text-classification" | "pair-classification":
            return TextClassification(
                labels=labels,
                max_length=max_length,
                problem=cast(Problem, settings.get("problem") or _problem_of_config(config, labels)),
                is_pair=name == "pair-classification",
            )
        case "token-classification":
            return TokenClassification(labels=labels, max_length=max_length, stride=stride)
        case "relation-extraction":
            markers = tuple(settings.get("markers", MARKERS))
            return RelationExtraction(labels=labels, max_length=max_length, markers=cast(Any, markers))
        case "question-answering":
            return QuestionAnswering(max_length=max_length, stride=stride)
        case "multiple-choice":
            return MultipleChoice(max_length=max_length)
        case "embedding":
            return Embedding(max_length=max_length)
        case "causal-lm" | "dialogue" | "translation" | "summarization":
            return Generation(
                name=name,
                max_length=int(settings.get("example_length", max_length)),
                instruction=settings.get("instruction"),
                is_encoder_decoder=bool(config.get("is_encoder_decoder")),
                decoder_start=config.get("decoder_start_token_id"),
            )
    raise UnsupportedError(f"{folder} has task {name!r}", hint=f"tasks are {', '.join(TASK_NAMES)}")


def _task_of_architecture(config: JsonObject) -> str | None:
    architecture = (config.get("architectures") or [""])[0]
    endings = {
        "ForSequenceClassification": "text-classification",
        "ForTokenClassification": "token-classification",
        "ForQuestionAnswering": "question-answering",
        "ForMultipleChoice": "multiple-choice",
        "ForCausalLM": "causal-lm",
    }
    return next((task for ending, task in endings.items() if architecture.endswith(ending)), None)


def _labels(folder: Path, config: JsonObject) -> tuple[str, ...]:
    by_index = config.get("id2label") or {}
    try:
        return tuple(str(by_index[key]) for key in sorted(by_index, key=int))
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: id2label has a key that is no number") from error


def _problem_of_config(config: JsonObject, labels: tuple[str, ...]) -> Problem:
    stored = str(config.get("problem_type") or "").removesuffix("_classification").replace("_", "-")
    return cast(Problem, stored or ("regression" if len(labels) == 1 else "single-label"))
