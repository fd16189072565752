"""What a task makes of one thing to predict: inputs of the encoder, and what becomes of their logits."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

from fastserve.engine.encoder import EncoderInput
from fastserve.types import Float32Array

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Prepared(Generic[T_co]):
    """`finish` takes what comes of the inputs, in their order, and gives the prediction."""

    inputs: Seq[EncoderInput]
    finish: Callable[[Seq[Float32Array]], T_co]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.inputs))


def inputs_of(prepared: Seq[Prepared[T]]) -> list[EncoderInput]:
    """The inputs of all, end to end."""
    return list(chain.from_iterable(one.inputs for one in prepared))


def finish_all(prepared: Seq[Prepared[T]], results: Seq[Float32Array]) -> list[T]:
    """The predictions, of what came of `inputs_of(prepared)`."""
    predictions = []
    start = 0
    for one in prepared:
        stop = start + len(one.inputs)
        predictions.append(one.finish(results[start:stop]))
        start = stop
    assert start == len(results)
    return predictions
