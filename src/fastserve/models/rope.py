"""Rotary tables from Hugging Face configs, in the float32 arithmetic of `transformers`: angles are equal.

Sources of all scalings: transformers, modeling_rope_utils.py, and the papers named below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.graph.node import RopeTable
from fastserve.types import Float32Array, JsonObject

DEFAULT_THETA = 10000.0  # of Llama configs from before `rope_theta` existed

_KNOWN_PARAMETERS = frozenset(
    (
        "rope_type",
        "type",
        "rope_theta",
        "partial_rotary_factor",
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "short_factor",
        "long_factor",
        "finetuned",  # how the model came to be, in YaRN's first configs
    )
)


@dataclass(frozen=True, slots=True)
class RopeTables:
    """How a layer turns queries and keys: by `usual`; by `long` where texts may be longer than
    `usual_context` tokens (LongRoPE)."""

    usual: RopeTable
    long: RopeTable | None = None
    usual_context: int | None = None

    def for_context(self, context_length: int) -> RopeTables:
        """The one table for texts of up to so many tokens.

        `transformers` chooses by the length of each text, and computes it anew when it grows past
        `usual_context`. One table for all is what vLLM and llama.cpp do too: keys that are kept stay valid.
        """
        if self.long is None or self.usual_context is None or context_length <= self.usual_context:
            return RopeTables(self.usual)
        return RopeTables(self.long)


@dataclass(frozen=True, slots=True)
class _Scaling:
    """What a kind of scaling is computed from."""

    parameters: JsonObject
    theta: float
    dim: int
    max_context: int | None  # max_position_embeddings

    def frequencies(self) -> Float32Array:
        return np.float32(1.0) / _powers(self.theta, self.dim)

    def positive(self, key: str) -> float:
        return _read_positive(self.parameters, key)

    def optional_positive(self, key: str) -> float | None:
        return None if self.parameters.get(key) is None else self.positive(key)

    def original_context(self) -> float:
        """Of training, before the context was stretched; by default the whole of it."""
        if self.parameters.get("original_max_position_embeddings") is None and self.max_context is not None:
            return float(self.max_context)
        return self.positive("original_max_position_embeddings")

    def factor(self) -> float:
        """By which the context was stretched."""
        if self.parameters.get("factor") is None and self.max_context is not None:
            return self.max_context / self.original_context()
        return self.positive("factor")

    def table(self, frequencies: Float32Array, scale: float = 1.0) -> RopeTable:
        return RopeTable(self.dim, tuple(float(frequency) for frequency in frequencies), scale)


def read_rope(
    config: JsonObject,
    head_dim: int,
    *,
    parameters: JsonObject | None = None,
    default_theta: float = DEFAULT_THETA,
    partial: float | None = None,
) -> RopeTables:
    """Read `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).

    `parameters` are those of one kind of layers, where a config has several. `partial` is for families in
    which part of a head turns: the share of its dimensions where the config does not say.

    >>> config = {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    >>> read_rope(config, head_dim=2).usual.inverse_frequencies
    (0.5,)

    Raises:
        CheckpointError: a parameter of the scaling is missing or impossible.
        UnsupportedError: a kind of scaling, or a parameter, that we do not compute.
    """
    parameters = rope_parameters(config) if parameters is None else parameters
    if not isinstance(parameters, Mapping):
        raise CheckpointError(f"the model's rope parameters must be a mapping, not {parameters!r}")
    unknown = sorted(parameters.keys() - _KNOWN_PARAMETERS)
    if unknown:
        raise UnsupportedError(
            f"rope parameter {unknown[0]}={parameters[unknown[0]]!r} is not supported",
            hint=f"supported are {', '.join(sorted(_KNOWN_PARAMETERS))}",
        )
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise UnsupportedError(
            f"rope type {kind!r} is not supported", hint=f"supported are {', '.join(_SCALINGS)}"
        )
    theta = _read_positive(parameters, "rope_theta") if "rope_theta" in parameters else default_theta
    max_context = config.get("max_position_embeddings")
    scaling = _Scaling(parameters, theta, _rotary_dim(parameters, head_dim, partial), max_context)
    return _SCALINGS[kind](scaling)


def _rotary_dim(parameters: JsonObject, head_dim: int, partial: float | None) -> int:
    share = parameters.get("partial_rotary_factor", 1.0 if partial is None else partial)
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
        raise CheckpointError(
            f"the model's rope parameters have partial_rotary_factor={share!r}; it must be above 0, at most 1"
        )
    if partial is None and share != 1:
        raise UnsupportedError(
            f"partial_rotary_factor={share!r} is not supported for this architecture",
            hint="it is for phi3 and gpt_neox",
        )
    dim = int(head_dim * share)
    if dim % 2 or not dim:
        what = "head_dim" if share == 1 else "number of rotary dimensions"
        raise CheckpointError(f"rotary embedding needs an even {what}, not {dim}")
    return dim


def rope_parameters(config: JsonObject) -> dict[str, Any]:
    """Both forms of a config in that of transformers 5: a mapping of `rope_theta` and the scaling's own keys.

    Raises:
        CheckpointError: they are no mapping.
    """
    found = config.get("rope_parameters")
    if found is None:
        found = config.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"the model's rope parameters must be a mapping, not {found!r}")
    outer = ("rope_theta", "partial_rotary_factor")
    return {key: config[key] for key in outer if config.get(key) is not None} | dict(found)


def _powers(theta: float, dim: int) -> Float32Array:
    """theta^(i / dim) for even i, every operation rounded to float32 [dim / 2].

    The power is rounded correctly from float64. That of torch is not everywhere, so some 1 % of the
    frequencies, at unusual dims, are one or two float32 steps away from ours.
    """
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)


def _scale_none(scaling: _Scaling) -> RopeTables:
    return RopeTables(scaling.table(scaling.frequencies()))


def _scale_linear(scaling: _Scaling) -> RopeTables:
    return RopeTables(scaling.table(scaling.frequencies() / np.float32(scaling.positive("factor"))))


def _scale_dynamic(scaling: _Scaling) -> RopeTables:
    """NTK-aware scaling that begins where max_position_embeddings ends: within a model's context, none.

    Past it, what `transformers` computes depends on how a text was cut into steps; so its context ends there.
    """
    scaling.positive("factor")
    return _scale_none(scaling)


def _scale_yarn(scaling: _Scaling) -> RopeTables:
    """Long waves are stretched by `factor`, short ones kept, with a ramp between (arXiv 2309.00071)."""
    factor, original = scaling.factor(), scaling.original_context()
    dim, theta = scaling.dim, scaling.theta
    if theta <= 1:
        raise CheckpointError(f"rope of type yarn needs rope_theta above 1, not {theta:g}")

    def dimension_of(num_rotations: float) -> float:
        """Where so many rotations fit into the original context."""
        return dim * math.log(original / (num_rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension_of(scaling.optional_positive("beta_fast") or 32)
    high = dimension_of(scaling.optional_positive("beta_slow") or 1)
    if scaling.parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = 0.001 if low == high else high - low
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width)
    kept = np.float32(1) - np.clip(ramp, 0, 1)
    powers = _powers(theta, dim)
    stretched = np.float32(1) / (np.float32(factor) * powers)
    frequencies = stretched * (np.float32(1) - kept) + np.float32(1) / powers * kept
    return RopeTables(scaling.table(frequencies, _yarn_scale(scaling, factor)))


def _yarn_scale(scaling: _Scaling, factor: float) -> float:
    attention_factor = scaling.optional_positive("attention_factor")
    if attention_factor is not None:
        return attention_factor
    over, under = scaling.optional_positive("mscale"), scaling.optional_positive("mscale_all_dim")

    def scale_of(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    return scale_of(over) / scale_of(under) if over and under else scale_of(1.0)


def _scale_longrope(scaling: _Scaling) -> RopeTables:
    """A factor for every frequency: one list for texts as long as the original context, one for longer
    ones (arXiv 2402.13753)."""
    factor, original = scaling.factor(), scaling.original_context()
    scale = scaling.optional_positive("attention_factor")
    if original <= 1:
        raise CheckpointError(
            f"rope of type longrope needs original_max_position_embeddings above 1, not {original:g}"
        )
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    powers = _powers(scaling.theta, scaling.dim)
    short, long = (
        scaling.table(np.float32(1) / (_read_factors(scaling, key) * powers), scale)
        for key in ("short_factor", "long_factor")
    )
    return RopeTables(short, long, int(original))


def _scale_llama3(scaling: _Scaling) -> RopeTables:
    """Long waves are stretched by `factor`, short ones kept, those between interpolated.

    Source: `apply_scaling` of meta-llama/llama-models, models/llama3/model.py, in the order of operations of
    `transformers`.
    """
    factor = np.float32(scaling.positive("factor"))
    low = scaling.positive("low_freq_factor")
    high = scaling.positive("high_freq_factor")
    context = scaling.original_context()
    if high <= low:
        raise CheckpointError(
            f"rope has high_freq_factor={high:g}, which must be above low_freq_factor={low:g}"
        )

    one = np.float32(1.0)
    frequencies = scaling.frequencies()
    # torch divides a number by a tensor in two roundings: reciprocal, then product.
    wavelengths = one / frequencies * np.float32(2 * math.pi)
    long, short = np.float32(context / low), np.float32(context / high)
    scaled = np.where(wavelengths > long, frequencies / factor, frequencies)
    smooth = (one / wavelengths * np.float32(context) - np.float32(low)) / np.float32(high - low)
    interpolated = (one - smooth) * scaled / factor + smooth * scaled
    is_between = (wavelengths >= short) & (wavelengths <= long)
    return RopeTables(scaling.table(np.where(is_between, interpolated, scaled)))


_SCALINGS: dict[str, Callable[[_Scaling], RopeTables]] = {
    "default": _scale_none,
    "linear": _scale_linear,
    "dynamic": _scale_dynamic,
    "yarn": _scale_yarn,
    "longrope": _scale_longrope,
    "llama3": _scale_llama3,
}


def _read_factors(scaling: _Scaling, key: str) -> Float32Array:
    found = scaling.parameters.get(key)
    count = scaling.dim // 2
    if not isinstance(found, Sequence) or not all(
        isinstance(factor, int | float) and not isinstance(factor, bool) and factor > 0 for factor in found
    ):
        raise CheckpointError(f"the model's rope parameters need a list of positive numbers in {key}")
    if len(found) != count:
        raise CheckpointError(
            f"the model's rope parameters have {len(found)} numbers in {key}; {count} were expected"
        )
    return np.asarray(found, np.float32)


def _read_positive(parameters: JsonObject, key: str) -> float:
    value = parameters.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise CheckpointError(
            f"the model's rope parameters have {key}={value!r}; it must be a positive number"
        )
    return float(value)
