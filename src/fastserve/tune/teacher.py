"""A teacher: a model that has learned a task, whose outputs on the training examples another learns from."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastserve.errors import OptionError
from fastserve.evaluate.task.generation import Generation
from fastserve.evaluate.task.table import task_of_folder
from fastserve.evaluate.task.task import Task
from fastserve.evaluate.torch_model import logits_of
from fastserve.hub.resolve import resolve
from fastserve.tune.logit_cache import LogitCache
from fastserve.tune.source_model import SourceModel, load_model, open_source_model


@dataclass(frozen=True, slots=True)
class TeacherOutputs:
    """What a teacher says of a batch.

    Attributes:
        logits: as `logits_of` gives them, padded with zeros.
        hidden_states: of the embedding and each layer, where they were asked for [rows, tokens, width].
        attentions: of each layer, where they were asked for [rows, heads, tokens, tokens].
    """

    logits: Tensor
    hidden_states: tuple[Tensor, ...] = ()
    attentions: tuple[Tensor, ...] = ()


class Teacher:
    """Its outputs by example: from disk where they have been kept, else computed.

    Args:
        model: of `transformers`, with the head of the task.
        columns: where each of the task's labels is among its own; None: in the same order.
        cache: of its logits; None: there is none.
    """

    def __init__(self, model: Any, columns: Tensor | None = None, cache: LogitCache | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.columns = columns
        self._cache = cache

    def outputs(
        self, inputs: Mapping[str, Tensor], examples: Seq[int], *, layers: bool, maps: bool
    ) -> TeacherOutputs:
        """
        Args:
            inputs: the batch, without labels.
            examples: the numbers of its examples.
            layers, maps: whether hidden states, and attention maps, are asked for.
        """
        device = inputs["input_ids"].device
        if self._cache is not None and not (layers or maps):
            logits = self._cache.batch(examples, num_tokens=inputs["input_ids"].shape[-1])
            return TeacherOutputs(self._in_order(torch.from_numpy(logits).to(device)))
        self.model.to(device)
        with torch.no_grad():
            found = self.model(**inputs, **flags_of(layers=layers, maps=maps))
        return TeacherOutputs(
            self._in_order(logits_of(found).float()),
            tuple(found["hidden_states"]) if layers else (),
            tuple(found["attentions"]) if maps else (),
        )

    def _in_order(self, logits: Tensor) -> Tensor:
        return logits if self.columns is None else logits[..., self.columns.to(logits.device)]


def flags_of(*, layers: bool, maps: bool) -> dict[str, bool]:
    """Arguments that have a model of `transformers` give hidden states and attention maps."""
    flags = {"output_hidden_states": layers, "output_attentions": maps}
    return {name: value for name, value in flags.items() if value}


def open_teacher(spec: str, task: Task, student: SourceModel) -> Teacher:
    """Load the teacher of a task.

    Raises:
        OptionError: it has not learned the task, or its labels or tokens are others than the student's.
        As `open_source_model`.
    """
    path = resolve(spec)
    source = open_source_model(spec, path)
    if source.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        raise OptionError(
            f"the teacher {spec} has other tokens than {student.spec}",
            hint="choose a teacher with the same tokenizer",
            option="teacher",
        )
    columns = None if isinstance(task, Generation) else _columns(spec, path, task)
    return Teacher(load_model(source, task, dropout=None), columns)


def check_teacher(spec: str, task: Task) -> None:
    """
    Raises:
        OptionError: the teacher has not learned the task, or its labels are others.
    """
    if not isinstance(task, Generation):
        _learned_labels(spec, resolve(spec), task)


def _columns(spec: str, path: Path, task: Task) -> Tensor | None:
    labels = _learned_labels(spec, path, task)
    if not task.labels or labels == task.labels:
        return None
    # load_model names the head's rows by the task's labels: those of the teacher stay where they were.
    return torch.tensor([labels.index(label) for label in task.labels])


def _learned_labels(spec: str, path: Path, task: Task) -> tuple[str, ...]:
    learned = task_of_folder(path)
    if learned.name != task.name:
        raise OptionError(
            f"the teacher {spec} has learned {learned.name}, not {task.name}",
            hint="tune it for the task first",
            option="teacher",
        )
    if set(learned.labels) != set(task.labels):
        odd = sorted(set(learned.labels) ^ set(task.labels))[0]
        raise OptionError(
            f"the teacher {spec} and the rows have other labels: {odd!r} is in one of them only",
            hint="choose rows with the labels that the teacher has learned",
            option="teacher",
        )
    return learned.labels
