"""A model that is ready to run, and what loading one comes to."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.generation import TargetRules
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.config import WeightFormat
from fastserve.engine.encoder import Encoder
from fastserve.engine.footprint import Footprint
from fastserve.errors import UnsupportedError
from fastserve.models.family import ModelConfig
from fastserve.models.task import Task, TaskSettings
from fastserve.types import Executable, Float64Array


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to run. `weights` and `context_length` are what the options came to; `draft` guesses at
    its tokens, where the options ask for it; `target_rules` are those of an encoder-decoder, whose executable
    is a SourceExecutable, and `own_target_tokenizer` that of its targets where they have a vocabulary of
    their own.

    Of an ensemble, `settings`, `context_length` and `footprint` are those of the whole, the rest is that of
    the first member. `member_index` is a member's place in one.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    settings: TaskSettings
    tokenizer: Tokenizer
    executable: Executable
    weights: WeightFormat
    context_length: int
    footprint: Footprint
    target_rules: TargetRules | None = None
    own_target_tokenizer: Tokenizer | None = None
    draft: LoadedModel | None = None
    ensemble: Ensemble | None = None
    member_index: int = 0

    @property
    def task(self) -> Task:
        return self.settings.task

    @property
    def target_tokenizer(self) -> Tokenizer:
        """Of what it writes; `tokenizer` is that of what it reads."""
        return self.own_target_tokenizer or self.tokenizer

    @property
    def reading_length(self) -> int:
        """Tokens to which a text is cut, or cut into windows of: as many as it was tuned with, which it reads
        best, within its context."""
        return min(self.context_length, self.settings.max_length or self.context_length)

    @property
    def members(self) -> tuple[LoadedModel, ...]:
        """Of an ensemble, in their order; a model that is none is its own only one."""
        return (self,) if self.ensemble is None else self.ensemble.members


@dataclass(frozen=True, slots=True)
class Ensemble:
    """Models that predict the same labels, each with its own tokenizer, and how they become one: `mix` is a
    `fastserve.engine.mix.Mix` of what each says."""

    members: tuple[LoadedModel, ...]
    mix: Callable[[Seq[Float64Array]], Float64Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """What loading a model comes to, its draft model included, reckoned before its weights are read."""

    settings: TaskSettings
    context_length: int
    kv_bytes: int  # of the model itself; 0 of an ensemble, whose members are reckoned each for itself
    total_bytes: int

    @property
    def task(self) -> Task:
        return self.settings.task


def make_encoder(model: LoadedModel) -> Encoder:
    """What runs a model that is no decoder, or all members of an ensemble."""
    first, *others = (member.executable for member in model.members)
    return Encoder(first, model.settings.head, others=others)


def check_task(task: Task, settings: TaskSettings, name: str) -> None:
    """
    Raises:
        UnsupportedError: the model called `name` is not made for the task.
    """
    if settings.can(task):
        return
    made_for = {"generate": "generates text", "embed": "is an encoder"}
    lacks = {"generate": "it does not generate text", "embed": "it has no embeddings"}
    hints = {
        "generate": "use embed, or a language model such as smollm2-135m-instruct",
        "embed": "use an encoder, such as all-minilm-l6-v2",
    }
    raise UnsupportedError(
        f"the model {name!r} {made_for.get(settings.task, f'is for {settings.task}')}; "
        f"{lacks.get(task, f'it has no head for {task}')}",
        hint=hints.get(task, f"use a model that was tuned for {task}"),
    )
