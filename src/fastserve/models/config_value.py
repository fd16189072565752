"""Values of a Hugging Face `config.json`, read strictly: nothing that matters is guessed.

Keys that do not change the computation (dropout, initializer_range, use_cache, ...) are not asked for; a
feature that we do not compute is refused by name.
"""

from __future__ import annotations

import math

from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.graph.node import ActivationKind
from fastserve.types import JsonObject

_ACTIVATIONS: dict[str, ActivationKind] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "tanh": "tanh",
}

# Beyond what any model has, and little enough that a graph and its tables are made in no time.
MAX_COUNT = 2**24
MAX_LAYERS = 512
_LAYER_KEYS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


def require(config: JsonObject, *keys: str) -> None:
    """
    Raises:
        CheckpointError: keys are absent or null; all are named.
    """
    missing = [key for key in keys if config.get(key) is None]
    if missing:
        raise CheckpointError(
            f"the model's config lacks {', '.join(missing)}",
            hint="take config.json from the model's source again",
        )


def refuse(config: JsonObject, key: str, only: object) -> None:
    """
    Raises:
        UnsupportedError: `key` is neither absent nor null, nor has the one value that we compute.
    """
    value = config.get(key)
    if value is not None and value != only:
        raise UnsupportedError(
            f"the model's config has {key}={value!r}, which is not supported",
            hint=f"choose a model whose {key} is {'absent' if only is None else repr(only)}",
        )


def read_count(config: JsonObject, key: str, *, default: int | None = None) -> int:
    """A whole number of at least 1. Raises CheckpointError where it is something else."""
    value = config.get(key)
    if value is None and default is not None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(
            f"the model's config has {key}={_shown(value)}; it must be a whole number of at least 1"
        )
    limit = MAX_LAYERS if key in _LAYER_KEYS else MAX_COUNT
    if value > limit:
        raise CheckpointError(
            f"the model's config has {key}={_shown(value)}, the limit is {limit}",
            hint="take config.json from the model's source again",
        )
    return value


def _shown(value: object) -> str:
    """The value for a message: digits without end are none of Python's to write."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_index(config: JsonObject, key: str, *, default: int) -> int:
    """A whole number of at least 0; `default` where the key is absent or null. Raises CheckpointError
    otherwise."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CheckpointError(
            f"the model's config has {key}={value!r}; it must be a whole number of at least 0"
        )
    return value


def read_optional_count(config: JsonObject, key: str) -> int | None:
    """`read_count`, or None where the key is absent or null."""
    return None if config.get(key) is None else read_count(config, key)


def read_eps(config: JsonObject, key: str) -> float:
    """A number in [0, 1). Raises CheckpointError where it is something else."""
    value = config[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise CheckpointError(f"the model's config has {key}={value!r}; it must be a number in [0, 1)")
    return float(value)


def read_optional_positive(config: JsonObject, key: str) -> float | None:
    """A finite number above 0, or None where the key is absent or null. Raises CheckpointError otherwise."""
    value = config.get(key)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise CheckpointError(f"the model's config has {key}={value!r}; it must be a positive number")
    return float(value)


def read_flag(config: JsonObject, key: str, *, default: bool = False) -> bool:
    """True or false. Raises CheckpointError where it is something else."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"the model's config has {key}={value!r}; it must be true or false")
    return value


def read_activation(config: JsonObject, *, default: str, key: str = "hidden_act") -> ActivationKind:
    """The activation by its name in `transformers`. Raises UnsupportedError where it is none of ours."""
    name = config.get(key)
    name = default if name is None else name
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise UnsupportedError(
            f"the model's config has {key}={name!r}, which is not supported",
            hint=f"supported are {', '.join(_ACTIVATIONS)}",
        )
    return _ACTIVATIONS[name]


def check_divides(key: str, divisor: int, whole_key: str, whole: int) -> None:
    """
    Raises:
        CheckpointError: one size of the config is no multiple of another.
    """
    if whole % divisor:
        raise CheckpointError(f"the model's config has {whole_key}={whole}, no multiple of {key}={divisor}")
