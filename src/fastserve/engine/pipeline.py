"""`pipeline`: a classic task by its name, and a model that was tuned for it, as one callable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from fastserve.config import Backend, KvDtype, WeightsChoice
from fastserve.engine.llm import LLM
from fastserve.engine.loaded_model import LoadedModel, make_encoder
from fastserve.engine.task.answer import (
    MAX_ANSWER_TOKENS,
    Answer,
    Choice,
    prepare_answer,
    prepare_choice,
)
from fastserve.engine.task.classification import Classification, Span, prepare_relation, prepare_text
from fastserve.engine.task.prepared import Prepared, finish_all, inputs_of
from fastserve.engine.task.row import Row, prepare_row
from fastserve.engine.task.token_classification import Tagging, prepare_tags
from fastserve.errors import ContextLengthError, OptionError
from fastserve.models.task import Task
from fastserve.option import check_choice
from fastserve.types import Float32Array

T = TypeVar("T")

_ROWS_AT_ONCE = 256  # of `predict`: enough for full steps, few enough to keep in memory


class Pipeline:
    """A model and its task. Made by `pipeline`; which arguments a call takes is the task's."""

    def __init__(self, llm: LLM, task: Task) -> None:
        self._llm = llm
        self._task = task
        self._encoder = make_encoder(llm.model)
        self._num_tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model. Closing again does nothing."""
        self._llm.close()

    @property
    def task(self) -> Task:
        return self._task

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the model's logits, in order; none where the task has none."""
        return self.model.settings.labels

    @property
    def num_tokens(self) -> int:
        """That it has read so far, in all."""
        return self._num_tokens

    @property
    def model(self) -> LoadedModel:
        """Raises OptionError where it is closed."""
        return self._llm.model

    def predict(self, rows: Iterable[Row], *, truncate: bool = False) -> Iterator[Any]:
        """The predictions for rows of data, one for each, in their order; see
        `fastserve.engine.task.row.prepare_row`.

        Args:
            truncate: cut texts that are longer than the model's limit, instead of refusing them.

        Raises:
            OptionError, ContextLengthError: of a row; by its place, where it was read by `fastserve.data`.
        """
        remaining = iter(rows)
        while some := list(islice(remaining, _ROWS_AT_ONCE)):
            yield from self._run([self._prepare(row, truncate=truncate) for row in some])

    def __call__(self, *args: Any, **options: Any) -> Any:
        raise NotImplementedError

    def _prepare(self, row: Row, *, truncate: bool) -> Prepared[Any]:
        try:
            return prepare_row(self.model, self._task, row, truncate=truncate)
        except (OptionError, ContextLengthError) as error:
            place = getattr(row, "place", None)  # of a row of `fastserve.data`
            if place is None:
                raise
            raise type(error)(f"{place}: {error.message}", hint=error.hint) from error

    def _run(self, prepared: Seq[Prepared[T]]) -> list[T]:
        inputs = inputs_of(prepared)
        self._num_tokens += sum(map(len, inputs))
        return finish_all(prepared, self._encoder.run_all(inputs))

    def _answer(self, prepared: Seq[Prepared[T]], *, is_one: bool) -> T | list[T]:
        found = self._run(prepared)
        return found[0] if is_one else found


class TextClassificationPipeline(Pipeline):
    """For text-classification and pair-classification."""

    def __call__(
        self, texts: str | Seq[str], text_pairs: str | Seq[str] | None = None, *, truncate: bool = False
    ) -> Classification | list[Classification]:
        """Classify a text, or several; with `text_pairs`, pairs of texts.

        Args:
            truncate: cut what is longer than the model's limit, instead of refusing it.

        Raises:
            OptionError: there are more or fewer of the second texts than of the first.
            ContextLengthError: a text is longer than the model's limit; nothing is run then.
        """
        firsts = _listed(texts)
        pairs: Seq[str | None] = [None] * len(firsts) if text_pairs is None else _listed(text_pairs)
        _check_as_many("text_pairs", pairs, firsts)
        if self._task == "pair-classification" and text_pairs is None:
            raise OptionError(
                "the model classifies pairs, and there is one text",
                hint="give text_pairs",
                option="text_pairs",
            )
        prepared = [
            prepare_text(self.model, text, pair, truncate=truncate)
            for text, pair in zip(firsts, pairs, strict=True)
        ]
        return self._answer(prepared, is_one=isinstance(texts, str))


class TokenClassificationPipeline(Pipeline):
    def __call__(
        self, texts: str | Seq[str] | Seq[Seq[str]], *, stride: int | None = None
    ) -> Tagging | list[Tagging]:
        """Tag the words of a text, or of several; a text may be given as a list of its words, among others.

        Args:
            stride: tokens that windows of a long text share; None: as the model was trained.
        """
        given: Seq[Any] = [texts] if isinstance(texts, str) else texts
        prepared = [prepare_tags(self.model, text, stride=stride) for text in given]
        return self._answer(prepared, is_one=isinstance(texts, str))


class RelationPipeline(Pipeline):
    def __call__(self, text: str, head: Span, tail: Span, *, truncate: bool = False) -> Classification:
        """The relation between two entities of a text, each `{"start", "end"}` in characters.

        Raises:
            OptionError: an entity is not within the text, or they overlap.
            ContextLengthError: as of text classification.
        """
        return self._run([prepare_relation(self.model, text, head, tail, truncate=truncate)])[0]


class QuestionPipeline(Pipeline):
    def __call__(
        self,
        question: str | Seq[str],
        context: str | Seq[str],
        *,
        can_be_unanswerable: bool = True,
        max_answer_tokens: int = MAX_ANSWER_TOKENS,
        stride: int | None = None,
    ) -> Answer | list[Answer]:
        """Answer a question with a passage of a text, or several questions, of one text or a text each.
        Arguments and errors as of `fastserve.engine.task.answer.prepare_answer`."""
        questions = _listed(question)
        contexts = [context] * len(questions) if isinstance(context, str) else _listed(context)
        _check_as_many("context", contexts, questions)
        prepared = [
            prepare_answer(
                self.model,
                asked,
                text,
                can_be_unanswerable=can_be_unanswerable,
                max_answer_tokens=max_answer_tokens,
                stride=stride,
            )
            for asked, text in zip(questions, contexts, strict=True)
        ]
        return self._answer(prepared, is_one=isinstance(question, str))


class ChoicePipeline(Pipeline):
    def __call__(self, question: str, choices: Seq[str], *, truncate: bool = False) -> Choice:
        """Choose one of several texts. Arguments and errors as of
        `fastserve.engine.task.answer.prepare_choice`."""
        return self._run([prepare_choice(self.model, question, choices, truncate=truncate)])[0]


class EmbeddingPipeline(Pipeline):
    def __call__(self, texts: str | Seq[str], *, truncate: bool = False) -> Float32Array:
        """See `LLM.embed`."""
        return self._llm.embed(texts, truncate=truncate)


_PIPELINES: dict[Task, type[Pipeline]] = {
    "text-classification": TextClassificationPipeline,
    "pair-classification": TextClassificationPipeline,
    "token-classification": TokenClassificationPipeline,
    "relation-extraction": RelationPipeline,
    "question-answering": QuestionPipeline,
    "multiple-choice": ChoicePipeline,
    "embed": EmbeddingPipeline,
}


def pipeline(
    task: str | None,
    model: str | Path,
    *,
    weights: WeightsChoice = "auto",
    kv_dtype: KvDtype = "f16",
    threads: int | None = None,
    context_length: int | None = None,
    backend: Backend = "native",
    device: str | None = None,
    max_batch_tokens: int | None = None,
    offline: bool = False,
    name: str | None = None,
) -> Pipeline:
    """Load a model for a task: a name, or a folder as `fastserve tune` or `transformers` writes it.

    >>> tag = pipeline("token-classification", "my-ner")  # doctest: +SKIP
    >>> tag("Ada Lovelace was born in London.")["entities"][0]  # doctest: +SKIP
    {'label': 'PER', 'score': 0.998, 'start': 0, 'end': 12, 'text': 'Ada Lovelace'}

    Args:
        task: one of text-classification, pair-classification, token-classification, relation-extraction,
            question-answering, multiple-choice, embedding; None: what the model was made for.
        weights, kv_dtype, threads, context_length, backend, device, max_batch_tokens, offline, name: as of
            `LLM`.

    Raises:
        OptionError: the task is unknown.
        UnsupportedError: the model is not made for it; said before weights are read.
        As `LLM`.
    """
    wanted: Any = "embed" if task == "embedding" else task
    if task is not None:
        names = tuple("embedding" if name == "embed" else name for name in _PIPELINES)
        check_choice("task", "embedding" if task == "embed" else task, names)
    llm = LLM(
        model,
        task=wanted,
        weights=weights,
        kv_dtype=kv_dtype,
        threads=threads,
        context_length=context_length,
        backend=backend,
        device=device,
        max_batch_tokens=max_batch_tokens,
        offline=offline,
        name=name,
    )
    own: Task = llm.model.task if wanted is None else wanted
    if own not in _PIPELINES:
        llm.close()
        raise OptionError(
            f"the model {llm.name!r} generates text, for which there is no pipeline", hint="use fastserve.LLM"
        )
    return _PIPELINES[own](llm, own)


def _listed(texts: str | Seq[str]) -> Seq[str]:
    listed = [texts] if isinstance(texts, str) else texts
    if not listed:
        raise OptionError("there are no texts", hint="give at least one")
    return listed


def _check_as_many(name: str, given: Seq[object], others: Seq[object]) -> None:
    if len(given) != len(others):
        raise OptionError(
            f"there are {len(given)} {name} for {len(others)} texts", hint="give one for each", option=name
        )
