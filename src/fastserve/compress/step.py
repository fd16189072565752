"""What a recipe is made of: steps, each a function of a working model and a context to a working model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.tensor import StoredTensor
from fastserve.errors import OptionError
from fastserve.models.matrices import find_matrices
from fastserve.types import JsonObject

Need = Literal["calibration", "train", "dev"]
"""A file that a step cannot do without."""


@dataclass(frozen=True, kw_only=True)
class WorkingModel:
    """A model between two steps. Nothing of the source is changed: steps give new tensors.

    Attributes:
        checkpoint: config, tokenizer files and tensors by Hugging Face name; matrices that were quantized are
            `GroupedTensor`s, zeros of pruned ones are zeros.
        int8_activations: names of int8 matrices that meet activations of int8 wherever they run (W8A8).
    """

    checkpoint: Checkpoint
    int8_activations: frozenset[str] = frozenset()

    @property
    def config(self) -> JsonObject:
        return self.checkpoint.config

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return self.checkpoint.tensors

    def with_tensors(self, changed: Mapping[str, StoredTensor], **fields: Any) -> WorkingModel:
        """This model with some tensors replaced, in their places; `fields` are other fields to change."""
        tensors = {name: changed.get(name, tensor) for name, tensor in self.tensors.items()}
        return replace(self, checkpoint=replace(self.checkpoint, tensors=tensors), **fields)

    def matrices(self, targets: Targets) -> tuple[str, ...]:
        """Names of the matrices that a step is for, in the order of the checkpoint.

        Raises:
            OptionError: there is none.
        """
        found = find_matrices(self.checkpoint)
        names = {*(found.linears if targets.linears else ()), *(found.tables if targets.tables else ())}
        chosen = tuple(name for name in self.tensors if name in names and targets.matches(name))
        if not chosen:
            raise OptionError(
                f"no matrix of {self.checkpoint.path} is meant by {targets}",
                hint=f"its matrices are {', '.join(sorted(names)[:4])}, ...",
            )
        return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Which matrices a step is for.

    Attributes:
        linears: those that are multiplied with, but for the head.
        tables: embeddings of tokens, and the head.
        include, exclude: regular expressions that a name must match, or must not, anywhere in it.

    Raises:
        OptionError: one is no regular expression.
    """

    linears: bool = True
    tables: bool = False
    include: str = ""
    exclude: str | None = None

    def __post_init__(self) -> None:
        for option, expression in (("include", self.include), ("exclude", self.exclude)):
            try:
                re.compile(expression or "")
            except re.error as error:
                raise OptionError(
                    f"{option}={expression!r} is no regular expression: {error}",
                    hint='write a part of a name, such as "mlp", or escape what has a meaning of its own',
                    option=option,
                ) from error

    def matches(self, name: str) -> bool:
        return re.search(self.include, name) is not None and (
            self.exclude is None or re.search(self.exclude, name) is None
        )


@dataclass(frozen=True, slots=True)
class LayerError:
    """What a step did to one matrix.

    Attributes:
        relative_error: squared norm of the change of its output over that of its output, on calibration rows
            where the step has any, or of the weights themselves.
        on: `outputs` or `weights`.
    """

    name: str
    step: str
    relative_error: float
    on: str


@dataclass(kw_only=True)
class Context:
    """What steps may use besides the model.

    Attributes:
        source: the folder, or file, of the model that compression began with: a teacher.
        scratch: a folder for what does not fit in memory; whoever made the context removes it.
        calibration: token ids of each sequence; empty where no step of the recipe calibrates.
        train, dev: files of labelled rows or text for steps that tune; None where none were given.
        task: as `fastserve tune` has it; None for what is judged as a language model.
        threads: of torch and of the native runtime; None: as many as there are cores.
        progress: is told what is being done, how many are done, and of how many.
        layers: what steps did to matrices, in order; steps append.
        notes: lines for the report: what was left out or done otherwise than asked; steps append.
    """

    source: Path
    scratch: Path
    calibration: Seq[Seq[int]] = ()
    train: Path | None = None
    dev: Path | None = None
    task: str | None = None
    seed: int = 0
    threads: int | None = None
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    layers: list[LayerError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Step(Protocol):
    """One step of a recipe: a frozen dataclass whose fields are its options in the recipe.

    A step's name in recipes is its key in `fastserve.compress.recipe.STEPS`.
    """

    @property
    def needs(self) -> frozenset[Need]:
        """What of the context it cannot do without."""

    def check(self, model: WorkingModel, context: Context) -> None:
        """Refuse what can be told from the shapes of a model and from files, before any step is run.

        Args:
            context: of which nothing is kept; without calibration text.

        Raises:
            As `run`.
        """

    def run(self, model: WorkingModel, context: Context) -> WorkingModel:
        """The model after this step.

        Raises:
            OptionError: an option that does not fit the model: which matrix, its shape, the limit.
            DataError: too little calibration text, or no rows where the step tunes.
            CheckpointError: weights that are not finite.
        """
