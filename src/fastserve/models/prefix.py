"""Prefix tuning (Li and Liang 2021, arXiv 2101.00190, section 4.2; P-tuning v2, arXiv 2110.07602): learned
keys and values of every layer, which all texts of a model come after.

`config.json` has `prefix_tuning: {"num_virtual_tokens": P}`, the checkpoint for each layer
`prefix.layers.N.keys` and `.values` [P, num_kv_heads * head_dim]. As in peft, keys are what attention
multiplies queries with: positions do not turn them. The first token of a text has position P.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.errors import CheckpointError
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Graph
from fastserve.models.config import DecoderConfig
from fastserve.types import JsonObject

PREFIX_KEY = "prefix_tuning"  # of config.json
MAX_PREFIX_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Prefix:
    """A model's prefix.

    Attributes:
        num_tokens: keys and values that each layer has of it; positions of texts begin there.
    """

    num_tokens: int


def prefix_tensor(layer_index: int, part: str) -> str:
    """The name of a tensor; `part` is keys or values.

    >>> prefix_tensor(3, "keys")
    'prefix.layers.3.keys'
    """
    return f"prefix.layers.{layer_index}.{part}"


def read_prefix(config: JsonObject) -> Prefix | None:
    """The prefix that a config.json names; None where the model has none.

    Raises:
        CheckpointError: it is described otherwise than it may be.
    """
    described = config.get(PREFIX_KEY)
    if described is None:
        return None
    num_tokens = described.get("num_virtual_tokens") if isinstance(described, dict) else None
    if type(num_tokens) is not int or not 1 <= num_tokens <= MAX_PREFIX_TOKENS:
        raise CheckpointError(
            f"the model's config has {PREFIX_KEY}={described!r}; it must give num_virtual_tokens, from 1 to"
            f" {MAX_PREFIX_TOKENS}",
            hint="take the model from its source again, config and weights together",
        )
    return Prefix(num_tokens)


def without_prefix(config: JsonObject) -> JsonObject:
    """The config of the model alone."""
    return {key: value for key, value in config.items() if key != PREFIX_KEY}


def build_prefix(config: DecoderConfig, prefix: Prefix) -> Graph:
    """The graph that stores a prefix: token i of its batches is the prefix's i-th; it has no output."""
    b = GraphBuilder()
    width = config.num_kv_heads * config.head_dim

    for index in range(config.num_layers):
        keys, values = (
            b.embedding("token_ids", prefix_tensor(index, part), size=prefix.num_tokens, width=width)
            for part in ("keys", "values")
        )
        b.store_source(keys, values, layer_index=index, head_dim=config.head_dim)
    return b.finish()
