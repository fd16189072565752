"""From the logits of a head to what they say: probabilities of labels, or numbers."""

from __future__ import annotations

import numpy as np

from fastserve.models.task import TaskSettings
from fastserve.types import Float32Array, Float64Array


def softmax(logits: Float32Array | Float64Array) -> Float64Array:
    """Probabilities along the last axis."""
    values = logits.astype(np.float64)
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def sigmoid(logits: Float32Array | Float64Array) -> Float64Array:
    values = logits.astype(np.float64)
    powers = np.exp(-np.abs(values))  # of what is not positive: nothing overflows
    return np.asarray(np.where(values < 0, powers, 1.0) / (1 + powers))


def shares_of(settings: TaskSettings, logits: Float32Array) -> Float64Array:
    """What the logits [..., labels] of a model's head say: a probability of each label, or the numbers
    themselves of regression."""
    if settings.problem_type == "regression":
        return logits.astype(np.float64)
    return softmax(logits) if are_exclusive(settings) else sigmoid(logits)


def are_exclusive(settings: TaskSettings) -> bool:
    """Whether one label alone is right, so that probabilities add up to 1."""
    is_per_token = settings.head is not None and settings.head.is_per_token
    return is_per_token or settings.problem_type == "single_label_classification"
