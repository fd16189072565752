"""Losses by the shape of their labels, each a sum over all that is learned divided by its number, so that parts
of a batch, and processes, add up to the whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastserve.evaluate.task.task import IGNORED

Loss = Callable[..., Tensor]
"""(outputs of the model, labels, num_items_in_batch) → mean loss, a scalar; as `transformers.Trainer` calls it."""


@dataclass(frozen=True, slots=True)
class ClassLoss:
    """Cross entropy over classes: of a sequence [rows, classes], or of each token [rows, tokens, classes].

    Labels are class numbers, `IGNORED` ones left out. `weights` [classes] multiply the loss of a class;
    `smoothing` is the share of the target that all classes have alike. With `shift`, position t predicts the
    label at t + 1 (language models).
    """

    smoothing: float = 0.0
    weights: Tensor | None = None
    shift: bool = False

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs["logits"].float()
        if self.shift:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        weights = None if self.weights is None else self.weights.to(logits.device)
        total = functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            labels.reshape(-1),
            weight=weights,
            ignore_index=IGNORED,
            label_smoothing=self.smoothing,
            reduction="sum",
        )
        return total / _count(labels, num_items_in_batch)


@dataclass(frozen=True, slots=True)
class SetLoss:
    """Binary cross entropy of each label by itself; labels are 0 or 1 [rows, labels]."""

    smoothing: float = 0.0

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        target = labels * (1 - self.smoothing) + self.smoothing / 2
        total = functional.binary_cross_entropy_with_logits(
            outputs["logits"].float(), target, reduction="sum"
        )
        return total / _count(labels, num_items_in_batch)


@dataclass(frozen=True, slots=True)
class NumberLoss:
    """Squared error of one number a row; labels [rows]."""

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        errors = outputs["logits"].float().squeeze(-1) - labels
        return (errors**2).sum() / _count(labels, num_items_in_batch)


@dataclass(frozen=True, slots=True)
class SpanLoss:
    """Cross entropy of where an answer starts and of where it ends; labels [rows, 2] are positions."""

    smoothing: float = 0.0

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        total = sum(
            functional.cross_entropy(
                outputs[f"{edge}_logits"].float(),
                labels[:, column],
                label_smoothing=self.smoothing,
                reduction="sum",
            )
            for column, edge in enumerate(("start", "end"))
        )
        assert isinstance(total, Tensor)
        return total / _count(labels, num_items_in_batch)


def _count(labels: Tensor, num_items_in_batch: Any) -> Any:
    """What is learned in the whole batch, or, where that is not known, in this part."""
    return (labels != IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch


def balanced_weights(targets: Tensor, num_classes: int) -> Tensor:
    """Weights [classes] with which each class of `targets` has the same sum: rows / (classes x rows of the
    class), as scikit-learn's "balanced". A class without rows has 0."""
    counts = torch.bincount(targets[targets != IGNORED].reshape(-1), minlength=num_classes).float()
    present = (counts > 0).sum()
    return torch.where(counts > 0, counts.sum() / (present * counts.clamp(min=1)), torch.zeros_like(counts))
