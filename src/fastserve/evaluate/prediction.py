"""How rows are predicted, whatever computes: options, and what a predictor is."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal, Protocol

from fastserve.config import WeightsChoice
from fastserve.errors import ContextLengthError
from fastserve.evaluate.task.task import Prediction, Row

BackendChoice = Literal["auto", "native", "torch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictorOptions:
    """
    Attributes:
        backend: `auto` is native, or torch where the native runtime does not have the model.
        weights, threads: of the native runtime.
        truncate: cut texts that are longer than the model's limit instead of refusing them.
        max_tokens: of a text that is generated.
    """

    backend: BackendChoice = "auto"
    weights: WeightsChoice = "auto"
    threads: int | None = None
    truncate: bool = False
    max_tokens: int = 128


class Predictor(Protocol):
    """Predictions for rows of one task, in their order. `backend` says what computes them; `num_tokens` are
    those that it has read and written so far, in all."""

    @property
    def backend(self) -> str: ...

    @property
    def num_tokens(self) -> int: ...

    def predict(self, rows: Seq[Row]) -> list[Prediction]: ...

    def close(self) -> None: ...


def check_not_cut(num_cut: int, max_length: int, options: PredictorOptions) -> None:
    """Raise ContextLengthError where rows had to be cut and nobody said that they may be."""
    if num_cut and not options.truncate:
        raise ContextLengthError(
            f"{num_cut} rows are longer than the {max_length} tokens that the model was tuned with",
            hint="--truncate cuts them",
        )
