"""Runs a `transformers` model over examples, in batches of like length: the trainer's way of looking at its
dev rows, and that of `fastserve evaluate` where the native runtime does not have the model."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from typing import Any

import numpy as np
import torch

from fastserve.evaluate.task.collate import collate, example_length
from fastserve.evaluate.task.generation import Generation
from fastserve.evaluate.task.task import IGNORED, Features, Task
from fastserve.types import Float32Array


def run_examples(
    model: Any,
    features: Seq[Features],
    *,
    pad_token_id: int,
    batch_size: int,
    loss: Callable[..., Any] | None = None,
    reduce: Callable[[Any, torch.Tensor], torch.Tensor] | None = None,
) -> tuple[list[Float32Array], float | None]:
    """The logits of each example, without padding, and the mean `loss` of their labels where one is given.

    An example's logits are [labels], or [tokens, labels]; of question answering [tokens, 2]; `reduce`
    (outputs, labels) gives something smaller in their place, where a vocabulary would fill the memory. The
    model is left in the mode it was in; no random number is drawn, so that training goes on as if nothing had
    been.
    """
    order = sorted(range(len(features)), key=lambda index: -example_length(features[index]))
    found: list[Float32Array | None] = [None] * len(features)
    total, num_learned = 0.0, 0
    was_training = model.training
    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            arrays = collate([features[index] for index in chosen], pad_token_id=pad_token_id)
            batch = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
            labels = batch.pop("labels", None)
            outputs = model(**batch)
            if loss is not None and labels is not None:
                mean = float(loss(outputs, labels))
                learned = int((labels != IGNORED).sum())
                total, num_learned = total + mean * learned, num_learned + learned
            if reduce is not None:
                assert labels is not None
                outputs = {"logits": reduce(outputs, labels)}
            rows = logits_of(outputs).float().cpu().numpy()
            for index, values in zip(chosen, rows, strict=True):
                per_token = values.ndim == 2 and values.shape[0] == arrays["input_ids"].shape[-1]
                length = example_length(features[index]) if per_token else len(values)
                found[index] = np.ascontiguousarray(values[:length])
    model.train(was_training)
    return [values for values in found if values is not None], total / num_learned if num_learned else None


def token_losses(outputs: Any, labels: torch.Tensor, *, shift: bool) -> torch.Tensor:
    """Of each row the sum of the losses of its tokens, and their number: [rows, 2]. With `shift`, position t
    predicts the label at t + 1."""
    logits = outputs["logits"].float()
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
    )
    return torch.stack([losses.sum(dim=1), (labels != IGNORED).sum(dim=1).float()], dim=1)


def reduction_of(task: Task) -> Callable[[Any, torch.Tensor], torch.Tensor] | None:
    """What `run_examples` is to keep of a task's outputs; None: the logits."""
    if not isinstance(task, Generation):
        return None
    return partial(token_losses, shift=not task.is_encoder_decoder)


def logits_of(outputs: Any) -> torch.Tensor:
    """What the heads of `transformers` call by several names; start and end of an answer as two columns."""
    if "start_logits" in outputs:
        return torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=-1)
    logits: torch.Tensor = outputs["embedding"] if "embedding" in outputs else outputs["logits"]
    return logits
