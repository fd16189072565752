"""Losses by the shape of their labels, each a sum over all that is learned divided by its number, so that
parts of a batch, and processes, add up to the whole."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastserve.errors import OptionError
from fastserve.evaluate.task.embedding import Embedding
from fastserve.evaluate.task.generation import Generation
from fastserve.evaluate.task.question_answering import QuestionAnswering
from fastserve.evaluate.task.task import IGNORED, Features, Task
from fastserve.evaluate.task.text_classification import TextClassification
from fastserve.tune.options import TuneOptions

Loss = Callable[..., Tensor]
"""(outputs of the model, labels, num_items_in_batch) → mean loss, a scalar; as `transformers.Trainer` calls
it."""


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
        return _mean(total, labels, num_items_in_batch)


@dataclass(frozen=True, slots=True)
class SetLoss:
    """Binary cross entropy of each label by itself; labels are 0 or 1 [rows, labels]."""

    smoothing: float = 0.0

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        target = labels * (1 - self.smoothing) + self.smoothing / 2
        total = functional.binary_cross_entropy_with_logits(
            outputs["logits"].float(), target, reduction="sum"
        )
        return _mean(total, labels, num_items_in_batch)


@dataclass(frozen=True, slots=True)
class NumberLoss:
    """Squared error of one number a row; labels [rows]."""

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        errors = outputs["logits"].float().squeeze(-1) - labels
        return _mean((errors**2).sum(), labels, num_items_in_batch)


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
        return _mean(total, labels, num_items_in_batch)


def _mean(total: Tensor, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    """`total` by what is learned in the whole batch, or, where that is not known, in this part."""
    if num_items_in_batch is None:
        return total / (labels != IGNORED).sum().clamp(min=1)
    mean: Tensor = total / num_items_in_batch
    return mean


@dataclass(frozen=True, slots=True)
class ContrastiveLoss:
    """Each text's pair is to be nearer than the other pairs' second texts: cross entropy over cosines divided
    by `temperature` (InfoNCE; van den Oord et al. 2018, arXiv 1807.03748, equation 4). Labels are not looked
    at."""

    temperature: float

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        first, second = functional.normalize(outputs["embedding"].float(), dim=-1).unbind(dim=1)
        scores = first @ second.T / self.temperature  # [pairs, pairs]
        target = torch.arange(len(scores), device=scores.device)
        total = functional.cross_entropy(scores, target, reduction="sum")
        return _mean(total, labels, num_items_in_batch)


@dataclass(frozen=True, slots=True)
class CosineLoss:
    """Squared error of the cosine of both embeddings, which is to be the label [pairs]."""

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        first, second = functional.normalize(outputs["embedding"].float(), dim=-1).unbind(dim=1)
        errors = (first * second).sum(dim=-1) - labels
        return _mean((errors**2).sum(), labels, num_items_in_batch)


def balanced_weights(targets: Tensor, num_classes: int) -> Tensor:
    """Weights [classes] with which each class of `targets` has the same sum: rows / (classes x rows of the
    class), as scikit-learn's "balanced". A class without rows has 0."""
    counts = torch.bincount(targets[targets != IGNORED].reshape(-1), minlength=num_classes).float()
    present = (counts > 0).sum()
    return torch.where(counts > 0, counts.sum() / (present * counts.clamp(min=1)), torch.zeros_like(counts))


def loss_of(task: Task, options: TuneOptions, features: Seq[Features]) -> Loss:
    """The loss of a task, as the options shape it; `features` are the training examples, whose labels weights
    are made of.

    Raises:
        OptionError: an option that the task's loss does not have.
    """
    smoothing = options.label_smoothing
    problem = task.problem if isinstance(task, TextClassification) else None
    has_numbers = problem == "regression" or isinstance(task, Embedding)
    if smoothing and has_numbers:
        raise OptionError("label_smoothing is for classes", hint="leave it out", option="label_smoothing")
    if options.class_weights != "none" and (not task.labels or problem in ("regression", "multi-label")):
        raise OptionError(
            f"class_weights={options.class_weights!r} is for one class a row or token",
            hint="leave it out",
            option="class_weights",
        )
    if problem == "regression":
        return NumberLoss()
    if problem == "multi-label":
        return SetLoss(smoothing)
    match task:
        case QuestionAnswering():
            return SpanLoss(smoothing)
        case Embedding():
            return CosineLoss() if task.has_labels else ContrastiveLoss(options.temperature)
        case Generation():
            return ClassLoss(smoothing, shift=not task.is_encoder_decoder)
    weights = None
    if options.class_weights == "balanced":
        targets = [torch.as_tensor(example["labels"]).reshape(-1) for example in features]
        weights = balanced_weights(torch.cat(targets), len(task.labels))
    return ClassLoss(smoothing, weights)
