"""Rotary tables from Hugging Face configs, in the float32 arithmetic of `transformers`: angles are equal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.graph.node import RopeTable
from fastserve.types import Float32Array, JsonObject

DEFAULT_THETA = 10000.0  # of Llama configs from before `rope_theta` existed


def read_rope_table(config: JsonObject, head_dim: int) -> RopeTable:
    """Read `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).

    Raises:
        CheckpointError: a parameter of the scaling is missing or not a positive number.
        UnsupportedError: a kind of scaling, or partial rotation, that we do not compute.
    """
    parameters = _rope_parameters(config)
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError(
            f"partial_rotary_factor={parameters['partial_rotary_factor']!r} is not supported",
            hint="only 1.0, or none, is",
        )
    if head_dim % 2:
        raise CheckpointError(f"rotary embedding needs an even head_dim, not {head_dim}")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _SCALINGS:
        raise UnsupportedError(
            f"rope type {kind!r} is not supported", hint=f"supported are {', '.join(_SCALINGS)}"
        )
    theta = _read_positive(parameters, "rope_theta") if "rope_theta" in parameters else DEFAULT_THETA
    frequencies = _SCALINGS[kind](_inverse_frequencies(theta, head_dim), parameters)
    return RopeTable(head_dim, tuple(float(frequency) for frequency in frequencies))


def _rope_parameters(config: JsonObject) -> dict[str, Any]:
    """Both forms in that of transformers 5: one mapping with `rope_theta` and the scaling's own keys."""
    found = config.get("rope_parameters")
    if found is None:
        found = config.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"the model's rope parameters must be a mapping, not {found!r}")
    outer = ("rope_theta", "partial_rotary_factor")
    return {key: config[key] for key in outer if config.get(key) is not None} | dict(found)


def _inverse_frequencies(theta: float, dim: int) -> Float32Array:
    """1 / theta^(i / dim) for even i, every operation rounded to float32 [dim / 2].

    The power is rounded correctly from float64. That of torch is not everywhere, so some 1 % of the
    frequencies, at unusual dims, are one or two float32 steps away from ours.
    """
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    powers = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1.0) / powers


def _scale_none(frequencies: Float32Array, parameters: JsonObject) -> Float32Array:
    return frequencies


def _scale_linear(frequencies: Float32Array, parameters: JsonObject) -> Float32Array:
    return frequencies / np.float32(_read_positive(parameters, "factor"))


def _scale_llama3(frequencies: Float32Array, parameters: JsonObject) -> Float32Array:
    """Long waves are stretched by `factor`, short ones kept, those between interpolated.

    Source: `apply_scaling` of meta-llama/llama-models, models/llama3/model.py, in the order of operations of
    `transformers`.
    """
    factor = np.float32(_read_positive(parameters, "factor"))
    low = _read_positive(parameters, "low_freq_factor")
    high = _read_positive(parameters, "high_freq_factor")
    context = _read_positive(parameters, "original_max_position_embeddings")
    if high <= low:
        raise CheckpointError(
            f"rope has high_freq_factor={high:g}, which must be above low_freq_factor={low:g}"
        )

    one = np.float32(1.0)
    # torch divides a number by a tensor in two roundings: reciprocal, then product.
    wavelengths = one / frequencies * np.float32(2 * math.pi)
    long, short = np.float32(context / low), np.float32(context / high)
    scaled = np.where(wavelengths > long, frequencies / factor, frequencies)
    smooth = (one / wavelengths * np.float32(context) - np.float32(low)) / np.float32(high - low)
    interpolated = (one - smooth) * scaled / factor + smooth * scaled
    return np.where((wavelengths >= short) & (wavelengths <= long), interpolated, scaled)


_SCALINGS: dict[str, Callable[[Float32Array, JsonObject], Float32Array]] = {
    "default": _scale_none,
    "linear": _scale_linear,
    "llama3": _scale_llama3,
}


def _read_positive(parameters: JsonObject, key: str) -> float:
    value = parameters.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise CheckpointError(
            f"the model's rope parameters have {key}={value!r}; it must be a positive number"
        )
    return float(value)
