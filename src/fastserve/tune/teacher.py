"""A teacher: a model that has learned a task, whose outputs on the training examples another learns from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastserve.errors import OptionError
from fastserve.evaluate.task.collate import example_length
from fastserve.evaluate.task.generation import Generation
from fastserve.evaluate.task.table import task_of_folder
from fastserve.evaluate.task.task import Features, Task
from fastserve.evaluate.torch_model import logits_of, run_examples
from fastserve.hub.resolve import resolve
from fastserve.tune.source_model import SourceModel, load_model, open_source_model
from fastserve.types import Float32Array

_MOST_CACHED_BYTES = 4 * 2**30  # of outputs on disk; more (vocabularies of long texts) are computed each time
_EXAMPLES_AT_A_TIME = 512


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


def _columns(spec: str, path: Path, task: Task) -> Tensor | None:
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
    if not task.labels or learned.labels == task.labels:
        return None
    # load_model names the head's rows by the task's labels: those of the teacher stay where they were.
    return torch.tensor([learned.labels.index(label) for label in task.labels])


class LogitCache:
    """A teacher's logits of all training examples, in a file."""

    def __init__(self, values: Float32Array, shapes: Seq[Seq[int]], *, is_per_token: bool) -> None:
        self._values, self._shapes, self._is_per_token = values, shapes, is_per_token
        self._starts = np.concatenate([[0], np.cumsum([int(np.prod(shape)) for shape in shapes])])

    def batch(self, examples: Seq[int], *, num_tokens: int) -> Float32Array:
        """Of some examples, those of tokens padded with zeros to `num_tokens`."""
        found = [self._of(int(index)) for index in examples]
        if not self._is_per_token:
            return np.stack(found)
        padded = np.zeros((len(found), num_tokens, found[0].shape[-1]), np.float32)
        for row, values in enumerate(found):
            padded[row, : len(values)] = values
        return padded

    def _of(self, index: int) -> Float32Array:
        start, shape = self._starts[index], self._shapes[index]
        return self._values[start : start + int(np.prod(shape))].reshape(shape)

    @classmethod
    def make(
        cls, teacher: Teacher, features: Seq[Features], folder: Path, *, pad_token_id: int
    ) -> LogitCache | None:
        """Compute what is not there yet. None where it would be too large for a disk.

        A file that was made of the same examples and teacher is used again.
        """
        (sample,), _ = run_examples(
            teacher.model, without_labels(features[:1]), pad_token_id=pad_token_id, batch_size=1
        )
        lengths = [example_length(example) for example in features]
        has_lists = isinstance(features[0]["input_ids"][0], list)  # pairs, choices
        is_per_token = sample.ndim == 2 and len(sample) == lengths[0] and not has_lists
        num_rows = sum(lengths) / lengths[0] if is_per_token else len(features)
        if sample.nbytes * num_rows > _MOST_CACHED_BYTES:
            return None
        about = folder / f"{_digest(teacher, features)}.json"
        if not about.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _write(teacher, features, about, pad_token_id)
        told = json.loads(about.read_text(encoding="utf-8"))
        values = np.memmap(about.with_suffix(".f32"), np.float32, "r")
        return cls(values, told["shapes"], is_per_token=is_per_token)


def without_labels(features: Seq[Features]) -> list[Features]:
    """What a model reads of examples."""
    return [{name: value for name, value in one.items() if name != "labels"} for one in features]


def _write(teacher: Teacher, features: Seq[Features], about: Path, pad_token_id: int) -> None:
    shapes: list[tuple[int, ...]] = []
    part = about.with_suffix(f".part{os.getpid()}")
    with part.open("wb") as file:
        for start in range(0, len(features), _EXAMPLES_AT_A_TIME):
            chosen = without_labels(features[start : start + _EXAMPLES_AT_A_TIME])
            logits, _ = run_examples(teacher.model, chosen, pad_token_id=pad_token_id, batch_size=32)
            for values in logits:
                shapes.append(values.shape)
                file.write(values.tobytes())
    os.replace(part, about.with_suffix(".f32"))
    written = about.with_suffix(f".json{os.getpid()}")
    written.write_text(json.dumps({"shapes": shapes}), encoding="utf-8")
    os.replace(written, about)


def _digest(teacher: Teacher, features: Seq[Features]) -> str:
    digest = hashlib.sha256()
    for name, values in teacher.model.state_dict().items():
        digest.update(name.encode())
        digest.update(values.contiguous().view(torch.uint8).numpy().data)
    for example in features:
        digest.update(repr(sorted(example.items())).encode())
    return digest.hexdigest()[:24]
