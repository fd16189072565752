"""Keeps the zeros of a pruned model's matrices while it learns."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class KeepZeros(TrainerCallback):  # type: ignore[misc]
    """Entries of matrices that are exactly 0 when this is made are so after every step of the optimizer.

    They are taken from the source's weights, before a checkpoint is loaded: a run that is resumed keeps those
    of one that never stopped, and none that training made by chance. Their gradients are 0 too, so that
    neither the norm that gradients are clipped by nor an optimizer's shared statistics see them.
    """

    def __init__(self, model: Any) -> None:
        self._zeros: list[tuple[Any, torch.Tensor]] = []
        for parameter in model.parameters():
            if parameter.ndim < 2 or not parameter.requires_grad:
                continue
            zeros = parameter.detach() == 0
            if zeros.any():
                parameter.register_hook(partial(_mask, zeros))
                self._zeros.append((parameter, zeros))

    @property
    def num_zeros(self) -> int:
        """How many there are, in all matrices."""
        return sum(int(zeros.sum()) for _, zeros in self._zeros)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        with torch.no_grad():
            for parameter, zeros in self._zeros:
                parameter.masked_fill_(zeros.to(parameter.device), 0)


def _mask(zeros: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return gradient.masked_fill(zeros.to(gradient.device), 0)
