"""`fastserve predict`: what a model that was tuned for a classic task says of texts, or of rows of a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastserve.cli.engine_option import engine_options, model_argument
from fastserve.cli.generate import read_texts
from fastserve.cli.option import json_option, offline_option
from fastserve.cli.report import print_json
from fastserve.config import EngineOptions
from fastserve.errors import OptionError

if TYPE_CHECKING:
    from fastserve.engine.pipeline import Pipeline

_OPTIONS = ("weights", "kv_dtype", "threads", "context_length", "backend", "device")


@click.command()
@model_argument
@click.argument(
    "texts",
    metavar="[TEXT...]",
    nargs=-1,
    help="Texts to predict for; - reads one from standard input. With --question, the text that has the "
    "answer, or the choices of a model for multiple choice.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File of rows to predict for, instead of texts: JSON lines, CSV, TSV and the like.",
)
@click.option("--question", help="Question that the texts answer.")
@click.option("--task", help="Task, where the model was made for several; by default its own.")
@click.option(
    "--truncate", is_flag=True, help="Cut texts that are too long for the model instead of refusing them."
)
@engine_options(*_OPTIONS)
@json_option
@offline_option
def predict(
    model: str,
    texts: Sequence[str],
    data: Path | None,
    question: str | None,
    task: str | None,
    truncate: bool,
    options: EngineOptions,
    json: bool,
    offline: bool,
) -> None:
    """Classify texts, tag their words, find relations, or answer questions.

    The model was tuned for one of these: a folder as `fastserve tune` or transformers writes it. Prints one
    line for each text or row.
    """
    if bool(texts) == (data is not None):
        raise OptionError("there is nothing to predict for", hint="give texts, or --data, one of the two")
    with _open(model, task, options, offline=offline, show_progress=not json) as pipe:
        rows = _rows_of_file(data) if data is not None else _rows_of_texts(pipe, read_texts(texts), question)
        predictions = pipe.predict(rows, truncate=truncate)
        if json:
            print_json({"task": pipe.task, "predictions": list(predictions)})
        else:
            for prediction in predictions:
                print(to_line(prediction))


def to_line(prediction: Mapping[str, Any]) -> str:
    """A prediction for people.

    >>> to_line({"label": "ham", "score": 0.98765, "probabilities": {}})
    'ham 0.988'
    """
    if "entities" in prediction:
        return "; ".join(
            f"{one.get('text') or ' '.join(prediction['tokens'][one['first_token'] : one['end_token']])} "
            f"{one['label']} {one['score']:.3f}"
            for one in prediction["entities"]
        )
    if "embedding" in prediction:
        return " ".join(map(str, prediction["embedding"]))
    if "labels" in prediction:
        return ", ".join(
            f"{label} {prediction['probabilities'][label]:.3f}" for label in prediction["labels"]
        )
    if "value" in prediction:
        return f"{prediction['value']:.6g}"
    if "values" in prediction:
        return ", ".join(f"{label} {value:.6g}" for label, value in prediction["values"].items())
    said = next(prediction[name] for name in ("label", "answer", "text") if name in prediction)
    return f"{said} {prediction['score']:.3f}".strip()


def _open(
    model: str, task: str | None, options: EngineOptions, *, offline: bool, show_progress: bool
) -> Pipeline:
    from fastserve.cli.progress_bar import download_progress
    from fastserve.engine.pipeline import pipeline
    from fastserve.hub.resolve import resolve

    with download_progress(shown=show_progress) as progress:
        path = resolve(model, offline=offline, progress=progress)
    given = asdict(options)
    return pipeline(task, path, name=model, **{name: given[name] for name in _OPTIONS})


def _rows_of_file(path: Path) -> Iterator[Mapping[str, Any]]:
    from fastserve.data import read_rows

    return read_rows(path)


def _rows_of_texts(pipe: Pipeline, texts: Sequence[str], question: str | None) -> Iterable[Mapping[str, Any]]:
    """
    Raises:
        OptionError: the task needs more than a text, or a question means nothing to it.
    """
    takes_question = pipe.task in ("question-answering", "multiple-choice")
    if pipe.task in ("pair-classification", "relation-extraction"):
        raise OptionError(f"a text alone is too little for {pipe.task}", hint="give rows by --data")
    if takes_question != (question is not None):
        raise OptionError(
            f"the model is for {pipe.task}",
            hint="give --question" if takes_question else "leave --question out",
            option="question",
        )
    if pipe.task == "question-answering":
        return [{"question": question, "context": text} for text in texts]
    if pipe.task == "multiple-choice":
        return [{"question": question, "choices": texts}]
    return [{"text": text} for text in texts]
