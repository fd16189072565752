"""What an architecture needs of a Hugging Face `config.json`, read strictly: nothing that matters is guessed.

Keys that do not change the computation (dropout, initializer_range, use_cache, ...) are ignored; a feature
that we do not compute is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.graph.node import ActivationKind, RopeTable
from fastserve.models.config_value import (
    check_divides,
    read_activation,
    read_count,
    read_eps,
    read_flag,
    refuse,
    require,
)
from fastserve.models.rope import read_rope_table
from fastserve.types import JsonObject


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
        require(
            config,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "rms_norm_eps",
            "max_position_embeddings",
        )
        refuse(config, "sliding_window", None)
        hidden_size = read_count(config, "hidden_size")
        num_heads = read_count(config, "num_attention_heads")
        num_kv_heads = read_count(config, "num_key_value_heads", default=num_heads)
        check_divides("num_key_value_heads", num_kv_heads, "num_attention_heads", num_heads)
        if config.get("head_dim") is None:
            check_divides("num_attention_heads", num_heads, "hidden_size", hidden_size)
        head_dim = read_count(config, "head_dim", default=hidden_size // num_heads)
        return cls(
            vocab_size=read_count(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=read_count(config, "intermediate_size"),
            num_layers=read_count(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            activation=read_activation(config, default="silu"),
            norm_eps=read_eps(config, "rms_norm_eps"),
            rope=read_rope_table(config, head_dim),
            max_context=read_count(config, "max_position_embeddings"),
            tie_word_embeddings=read_flag(config, "tie_word_embeddings"),
            attention_bias=read_flag(config, "attention_bias"),
            mlp_bias=read_flag(config, "mlp_bias"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """A bidirectional encoder. Families add what they have beyond this."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    activation: ActivationKind
    norm_eps: float
    max_context: int
    num_token_types: int  # 0: token types mean nothing to it
    position_offset: int = 0  # rows of the position table before that of position 0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads
