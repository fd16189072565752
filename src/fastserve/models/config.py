"""What the engine asks of every model's config; the families add what they compute by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from fastserve.graph.node import ActivationKind

# Of models whose positions are relative: nothing of theirs ends there. Tables of biases take a MiB a head.
MAX_RELATIVE_CONTEXT = 2**17


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
    own_head_dim: int | None = None  # where heads do not share the hidden size out among them

    @property
    def head_dim(self) -> int:
        return self.own_head_dim or self.hidden_size // self.num_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderDecoderConfig:
    """An encoder of a source, and a decoder of its target, which has its heads and its width, and its tokens
    unless it has a vocabulary of its own.

    A source and a target may each be `max_context` tokens long; `usual_context` is the default.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_heads: int
    head_dim: int
    activation: ActivationKind
    norm_eps: float
    usual_context: int
    max_context: int = MAX_RELATIVE_CONTEXT
    own_target_vocab_size: int | None = None  # where source and target have a vocabulary each

    @property
    def has_two_vocabularies(self) -> bool:
        return self.own_target_vocab_size is not None

    @property
    def target_vocab_size(self) -> int:
        return self.own_target_vocab_size or self.vocab_size
