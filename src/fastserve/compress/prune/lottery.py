"""Lottery tickets: what is left of a trained model goes back to its early weights, and learns again (Frankle
& Carbin, arXiv 1803.03635; rewinding to early weights: arXiv 1912.05671)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fastserve.checkpoint.convert import to_f32
from fastserve.compress.prune.magnitude import Magnitude
from fastserve.compress.prune.matrix import write_matrix
from fastserve.compress.prune.training import check_tuning, read_tuning, tune_model
from fastserve.compress.step import Context, Need, Targets, WorkingModel
from fastserve.option import check_integer, check_number


@dataclass(frozen=True, kw_only=True)
class Lottery:
    """The step `lottery`: tune, prune by magnitude over all matrices, rewind what is left to the weights
    after `rewind_steps`, and again; in the end the ticket is tuned.

    Attributes:
        sparsity: share of entries that are gone in the end.
        rounds: of pruning; each takes the same share of what is left.
        rewind_steps: of the optimizer, after which weights are the early ones.
        tune: options of `fastserve tune` by name, of each round; and `on_problem`.

    Raises:
        OptionError: a number out of range, or an option that tuning does not have.
    """

    sparsity: float = 0.5
    rounds: int = 2
    rewind_steps: int = 50
    tune: Mapping[str, Any] = field(default_factory=dict)
    targets: Targets = field(default_factory=Targets)

    def __post_init__(self) -> None:
        check_number("sparsity", self.sparsity, 0.0, 0.999, is_low_open=True)
        check_integer("rounds", self.rounds, low=1)
        check_integer("rewind_steps", self.rewind_steps, low=1)
        read_tuning(self.tune)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"train"})

    def check(self, model: WorkingModel, context: Context) -> None:
        """Raises as `Step.check`."""
        model.matrices(self.targets)
        check_tuning(model, context, read_tuning(self.tune, context), step="lottery")

    def run(self, model: WorkingModel, context: Context) -> WorkingModel:
        """Raises as `Step.run`."""
        tuning = read_tuning(self.tune, context)
        options = replace(tuning.options, max_steps=self.rewind_steps, warmup=0.0, schedule="constant")
        beginning = replace(tuning, options=options)
        early = tune_model(model, context, beginning, step="lottery")
        ticket = early
        for number in range(1, self.rounds + 1):
            context.progress("lottery", number - 1, self.rounds + 1)
            trained = tune_model(ticket, context, tuning, step="lottery")
            share = 1 - (1 - self.sparsity) ** (number / self.rounds)
            prune = Magnitude(sparsity=share, scope="global", targets=self.targets)
            ticket = rewind(early, prune.run(trained, context), self.targets)
        return tune_model(ticket, context, tuning, step="lottery")


def rewind(early: WorkingModel, pruned: WorkingModel, targets: Targets) -> WorkingModel:
    """The early weights, zeros where the pruned model has them."""
    changed = {}
    for name in pruned.matrices(targets):
        tensor = early.tensors[name]
        kept = to_f32(pruned.tensors[name]) != 0
        changed[name] = write_matrix(tensor, np.where(kept, to_f32(tensor), np.float32(0)))
    return early.with_tensors(changed)
