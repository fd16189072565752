"""Recovery: a pruned model is tuned, and what was pruned stays so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastserve.compress.prune.training import check_tuning, read_tuning, tune_model
from fastserve.compress.step import Context, Need, WorkingModel


@dataclass(frozen=True, kw_only=True)
class Recover:
    """The step `recover`: masked fine-tuning on the context's rows; of a language model on its text.

    Attributes:
        tune: options of `fastserve tune` by name, such as {"epochs": 2, "learning_rate": 1e-4}; and
            `on_problem`, what to do about problems of the rows.

    Raises:
        OptionError: an option that tuning does not have.
    """

    tune: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        read_tuning(self.tune)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"train"})

    def check(self, model: WorkingModel, context: Context) -> None:
        """Raises as `Step.check`."""
        check_tuning(model, context, read_tuning(self.tune, context), step="recover")

    def run(self, model: WorkingModel, context: Context) -> WorkingModel:
        """Raises as `Step.run`."""
        return tune_model(model, context, read_tuning(self.tune, context), step="recover")
