"""What an architecture needs of a Hugging Face `config.json`, read strictly: nothing that matters is guessed.

Keys that do not change the computation (dropout, initializer_range, use_cache, ...) are ignored; a feature
that we do not compute is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.graph.node import ActivationKind, RopeTable
from fastserve.models.rope import read_rope_table
from fastserve.types import JsonObject

_ACTIVATIONS: dict[str, ActivationKind] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A causal language model of the Llama kind."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: ActivationKind
    norm_eps: float
    rope: RopeTable
    max_context: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def from_hf(cls, config: JsonObject) -> DecoderConfig:
        """Read the config of a Llama model.

        Raises:
            CheckpointError: required keys are missing (all are named), or a value is impossible.
            UnsupportedError: a feature that we do not compute.
        """
        _require(
            config,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "rms_norm_eps",
            "max_position_embeddings",
        )
        _refuse(config, "sliding_window", None)
        hidden_size = _read_count(config, "hidden_size")
        num_heads = _read_count(config, "num_attention_heads")
        num_kv_heads = _read_count(config, "num_key_value_heads", default=num_heads)
        _check_divides("num_key_value_heads", num_kv_heads, "num_attention_heads", num_heads)
        if config.get("head_dim") is None:
            _check_divides("num_attention_heads", num_heads, "hidden_size", hidden_size)
        head_dim = _read_count(config, "head_dim", default=hidden_size // num_heads)
        return cls(
            vocab_size=_read_count(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_read_count(config, "intermediate_size"),
            num_layers=_read_count(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            activation=_read_activation(config, default="silu"),
            norm_eps=_read_eps(config, "rms_norm_eps"),
            rope=read_rope_table(config, head_dim),
            max_context=_read_count(config, "max_position_embeddings"),
            tie_word_embeddings=_read_flag(config, "tie_word_embeddings"),
            attention_bias=_read_flag(config, "attention_bias"),
            mlp_bias=_read_flag(config, "mlp_bias"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """A bidirectional encoder of the BERT kind."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    activation: ActivationKind
    norm_eps: float
    max_context: int
    num_token_types: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @classmethod
    def from_hf(cls, config: JsonObject) -> EncoderConfig:
        """Read the config of a BERT model. Raises as `DecoderConfig.from_hf`."""
        _require(
            config,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "layer_norm_eps",
            "max_position_embeddings",
            "type_vocab_size",
        )
        _refuse(config, "position_embedding_type", "absolute")
        _refuse(config, "is_decoder", False)
        _refuse(config, "add_cross_attention", False)
        hidden_size = _read_count(config, "hidden_size")
        num_heads = _read_count(config, "num_attention_heads")
        _check_divides("num_attention_heads", num_heads, "hidden_size", hidden_size)
        return cls(
            model_type=str(config["model_type"]),
            vocab_size=_read_count(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_read_count(config, "intermediate_size"),
            num_layers=_read_count(config, "num_hidden_layers"),
            num_heads=num_heads,
            activation=_read_activation(config, default="gelu"),
            norm_eps=_read_eps(config, "layer_norm_eps"),
            max_context=_read_count(config, "max_position_embeddings"),
            num_token_types=_read_count(config, "type_vocab_size"),
        )


def _require(config: JsonObject, *keys: str) -> None:
    missing = [key for key in keys if config.get(key) is None]
    if missing:
        raise CheckpointError(
            f"the model's config lacks {', '.join(missing)}",
            hint="take config.json from the model's source again",
        )


def _refuse(config: JsonObject, key: str, only: object) -> None:
    """Raise unless `key` is absent, null or has the one value that we compute."""
    value = config.get(key)
    if value is not None and value != only:
        raise UnsupportedError(
            f"the model's config has {key}={value!r}, which is not supported",
            hint=f"choose a model whose {key} is {'absent' if only is None else repr(only)}",
        )


def _read_count(config: JsonObject, key: str, *, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(
            f"the model's config has {key}={value!r}; it must be a whole number of at least 1"
        )
    return value


def _read_eps(config: JsonObject, key: str) -> float:
    value = config[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise CheckpointError(f"the model's config has {key}={value!r}; it must be a number in [0, 1)")
    return float(value)


def _read_flag(config: JsonObject, key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"the model's config has {key}={value!r}; it must be true or false")
    return bool(value)


def _read_activation(config: JsonObject, *, default: str) -> ActivationKind:
    name = config.get("hidden_act")
    name = default if name is None else name
    if name not in _ACTIVATIONS:
        raise UnsupportedError(
            f"the model's config has hidden_act={name!r}, which is not supported",
            hint=f"supported are {', '.join(_ACTIVATIONS)}",
        )
    return _ACTIVATIONS[name]


def _check_divides(key: str, divisor: int, whole_key: str, whole: int) -> None:
    if whole % divisor:
        raise CheckpointError(f"the model's config has {whole_key}={whole}, no multiple of {key}={divisor}")
