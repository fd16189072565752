"""What the engine and the tools around it know of a model, whatever its family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from fastserve.graph.node import ActivationKind
from fastserve.models.config_value import (
    check_divides,
    read_activation,
    read_count,
    read_eps,
    refuse,
    require,
)
from fastserve.types import JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A causal language model. Families add what they have beyond this."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: ActivationKind
    norm_eps: float
    max_context: int
    tie_word_embeddings: bool

    @property
    def usual_context(self) -> int:
        """The longest context in which all texts are computed as short ones are: the default."""
        return self.max_context

    def for_context(self, context_length: int) -> Self:
        """This model as it is computed where texts may be `context_length` tokens long."""
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """A bidirectional encoder of the BERT kind."""

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
        """Read the config of a BERT model.

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
            "layer_norm_eps",
            "max_position_embeddings",
            "type_vocab_size",
        )
        refuse(config, "position_embedding_type", "absolute")
        refuse(config, "is_decoder", False)
        refuse(config, "add_cross_attention", False)
        hidden_size = read_count(config, "hidden_size")
        num_heads = read_count(config, "num_attention_heads")
        check_divides("num_attention_heads", num_heads, "hidden_size", hidden_size)
        return cls(
            vocab_size=read_count(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=read_count(config, "intermediate_size"),
            num_layers=read_count(config, "num_hidden_layers"),
            num_heads=num_heads,
            activation=read_activation(config, default="gelu"),
            norm_eps=read_eps(config, "layer_norm_eps"),
            max_context=read_count(config, "max_position_embeddings"),
            num_token_types=read_count(config, "type_vocab_size"),
        )
