"""The post-norm encoder of BERT (arXiv 1810.04805), which its kin share: they differ by names, by what is
added to the scores of attention, and by where positions begin.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from fastserve.errors import CheckpointError
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import RelativeBias, Value
from fastserve.models.config import EncoderConfig
from fastserve.models.config_value import (
    check_divides,
    read_activation,
    read_count,
    read_eps,
    read_optional_count,
    refuse,
    require,
)
from fastserve.types import JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerModules:
    """Names of a layer's modules, within the layer."""

    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    attention_output: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    output_norm: str = "output.LayerNorm"


def read_post_norm(
    config: JsonObject, *, has_token_types: bool = True, position_offset: int = 0
) -> EncoderConfig:
    """Read a config whose keys are those of BERT. The position table has `position_offset` rows that no
    position reads.

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
        *(["type_vocab_size"] if has_token_types else []),
    )
    refuse(config, "position_embedding_type", "absolute")
    refuse(config, "is_decoder", False)
    refuse(config, "add_cross_attention", False)
    hidden_size = read_count(config, "hidden_size")
    num_heads = read_count(config, "num_attention_heads")
    head_dim = read_own_head_dim(config, "num_attention_heads", num_heads, "hidden_size", hidden_size)
    return EncoderConfig(
        model_type=str(config["model_type"]),
        vocab_size=read_count(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=read_count(config, "intermediate_size"),
        num_layers=read_count(config, "num_hidden_layers"),
        num_heads=num_heads,
        activation=read_activation(config, default="gelu"),
        norm_eps=read_eps(config, "layer_norm_eps"),
        max_context=read_max_context(config, position_offset),
        num_token_types=read_count(config, "type_vocab_size") if has_token_types else 0,
        position_offset=position_offset,
        own_head_dim=head_dim,
    )


def read_own_head_dim(
    config: JsonObject, heads_key: str, num_heads: int, width_key: str, width: int
) -> int | None:
    """`head_dim`: a key of ours, for encoders that heads were pruned from (`transformers` has none for these
    families, and refuses their weights by their shapes). None where it is absent.

    Raises:
        CheckpointError: it is absent, and the heads do not divide the width.
    """
    head_dim = read_optional_count(config, "head_dim")
    if head_dim is None:
        check_divides(heads_key, num_heads, width_key, width)
    return head_dim


def read_max_context(config: JsonObject, position_offset: int) -> int:
    """`max_position_embeddings`, less the rows of the table that no position reads.

    Raises:
        CheckpointError: no row is left.
    """
    num_rows = read_count(config, "max_position_embeddings")
    if num_rows <= position_offset:
        raise CheckpointError(
            f"the model's config has max_position_embeddings={num_rows};"
            f" positions begin at row {position_offset}, so it must be above that"
        )
    return num_rows - position_offset


def find_prefix(model: str, tensor_names: Collection[str]) -> str:
    """`model.` where the checkpoint was saved with a head on top, else nothing."""
    return f"{model}." if any(name.startswith(f"{model}.") for name in tensor_names) else ""


class PostNormEncoder:
    """Builds an encoder in a graph, part by part.

    Args:
        prefix: of the names of all parameters.
        bias: what is added to the scores of every layer's attention.
        tensor_names: those of the checkpoint. Its norms may be named `gamma` and `beta` (made by TensorFlow).
    """

    def __init__(
        self,
        b: GraphBuilder,
        config: EncoderConfig,
        *,
        prefix: str,
        tensor_names: Collection[str],
        modules: LayerModules | None = None,
        bias: RelativeBias | None = None,
    ) -> None:
        self._b = b
        self._config = config
        self._modules = modules or LayerModules()
        self._bias = bias
        self._prefix = prefix
        is_from_tensorflow = f"{prefix}embeddings.LayerNorm.gamma" in tensor_names
        self._scale, self._shift = ("gamma", "beta") if is_from_tensorflow else ("weight", "bias")

    def embed(self, *, width: int | None = None) -> Value:
        """Words, token types where the model has them, and positions [tokens, width], normed; `width` is by
        default the hidden size."""
        b, config, prefix = self._b, self._config, f"{self._prefix}embeddings"
        width = config.hidden_size if width is None else width
        x = b.embedding("token_ids", f"{prefix}.word_embeddings.weight", size=config.vocab_size, width=width)
        if config.num_token_types:
            name = f"{prefix}.token_type_embeddings.weight"
            x = b.add(x, b.embedding("token_types", name, size=config.num_token_types, width=width))
        positions = b.embedding(
            "positions",
            f"{prefix}.position_embeddings.weight",
            size=config.max_context + config.position_offset,
            width=width,
            offset=config.position_offset,
        )
        return self._norm(b.add(x, positions), "embeddings.LayerNorm")

    def layers(self, x: Value, name: str) -> Value:
        """All layers, of which `name` with an index is the name."""
        for layer_index in range(self._config.num_layers):
            x = self.layer(x, f"{name}.{layer_index}", layer_index=layer_index)
        return x

    def layer(self, x: Value, name: str, *, layer_index: int) -> Value:
        """Attention and MLP, each added to what it reads, then normed."""
        b, config, modules = self._b, self._config, self._modules
        attended = self._attention(x, name, layer_index)
        projected = self.linear(attended, f"{name}.{modules.attention_output}", config.hidden_size)
        x = self._norm(b.add(projected, x), f"{name}.{modules.attention_norm}")
        hidden = self.linear(x, f"{name}.{modules.up}", config.intermediate_size)
        hidden = b.activation(hidden, config.activation)
        projected = self.linear(hidden, f"{name}.{modules.down}", config.hidden_size)
        return self._norm(b.add(projected, x), f"{name}.{modules.output_norm}")

    def linear(self, x: Value, name: str, width: int) -> Value:
        name = f"{self._prefix}{name}"
        return self._b.linear(x, f"{name}.weight", bias=f"{name}.bias", width=width)

    def _norm(self, x: Value, name: str) -> Value:
        name = f"{self._prefix}{name}"
        return self._b.layer_norm(
            x, f"{name}.{self._scale}", f"{name}.{self._shift}", eps=self._config.norm_eps
        )

    def _attention(self, x: Value, name: str, layer_index: int) -> Value:
        config, modules = self._config, self._modules
        q, k, v = (
            self.linear(x, f"{name}.{module}", config.num_heads * config.head_dim)
            for module in (modules.query, modules.key, modules.value)
        )
        return self._b.attention(
            q,
            k,
            v,
            layer_index=layer_index,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            causal=False,
            bias=self._bias,
        )
