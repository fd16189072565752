"""What can be taken out of a model whole: the heads and neurons of its layers, as its graph has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fastserve.compress.step import WorkingModel
from fastserve.errors import UnsupportedError
from fastserve.graph.node import (
    Activation,
    Add,
    Attention,
    GatedActivation,
    Graph,
    LayerNorm,
    Linear,
    Node,
    RmsNorm,
    Rope,
    Slice,
    Value,
)
from fastserve.models.family import build_graph, read_config

_LAYER = re.compile(r"^(.*?\.?(?:layer|layers))\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class ConfigKeys:
    """Where a family's config has its sizes.

    Attributes:
        is_decoder: of the Llama kind: head_dim and num_key_value_heads are keys of transformers.
        heads_divide_width: transformers 5 refuses other numbers of heads, though head_dim says their width.
    """

    neurons: str = "intermediate_size"
    heads: str = "num_attention_heads"
    layers: str = "num_hidden_layers"
    is_decoder: bool = True
    heads_divide_width: bool = False


_ENCODER = ConfigKeys(is_decoder=False)
FAMILIES: Mapping[str, ConfigKeys] = {
    **dict.fromkeys(("mistral", "qwen2", "qwen3", "gemma", "smollm3"), ConfigKeys()),
    **dict.fromkeys(("llama", "gemma2", "gemma3_text"), ConfigKeys(heads_divide_width=True)),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "mpnet"), _ENCODER),
    "distilbert": ConfigKeys("hidden_dim", "n_heads", "n_layers", is_decoder=False),
}


@dataclass(frozen=True, slots=True)
class Part:
    """What some units of a layer make, and one matrix reads: the neurons of a feed-forward part, or the heads
    of an attention, those that share a key together.

    Attributes:
        makers: linears with the rows of each unit, and how many rows those are.
        reader: the linear with the columns of each unit.
        num_units: neurons, or heads of keys.
        width: columns of a unit.
    """

    layer: int
    makers: tuple[tuple[Linear, int], ...]
    reader: Linear
    num_units: int
    width: int

    @property
    def name(self) -> str:
        """Of the reader's matrix."""
        return self.reader.weight.names[0]


@dataclass(frozen=True, slots=True)
class Structure:
    """A model's parts, layer by layer.

    Attributes:
        stem: what names of a layer's tensors begin with, before its number.
        bias: the table that all layers add to their scores [buckets, heads], where there is one.
        streams: the value that each layer reads and adds to, and what the last one gives [layers + 1].
    """

    graph: Graph
    keys: ConfigKeys
    num_layers: int
    stem: str
    attentions: tuple[Part, ...]
    feed_forwards: tuple[Part, ...]
    bias: str | None
    streams: tuple[Value, ...]


def find_structure(model: WorkingModel) -> Structure:
    """
    Raises:
        UnsupportedError: a family whose layers are not named, or whose matrices are stored together.
        CheckpointError: the model is none that we have.
    """
    model_type = str(model.config.get("model_type"))
    if model_type not in FAMILIES:
        raise UnsupportedError(
            f"structured pruning of a {model_type!r} model is not supported",
            hint=f"supported are {', '.join(FAMILIES)}; the other steps prune within matrices",
        )
    config = read_config(model.config)
    graph = build_graph(config, model.tensors.keys())
    makers = graph.producers()
    attentions = [node for node in graph.nodes if isinstance(node, Attention)]
    biases = [node.bias.weight.names[0] for node in attentions if node.bias is not None]
    query = _linear_of(attentions[0].q, makers)
    stem = _LAYER.match(query.weight.names[0])
    assert stem is not None, f"{query.weight.names} names no layer"
    return Structure(
        graph=graph,
        keys=FAMILIES[model_type],
        num_layers=len(attentions),
        stem=stem[1],
        attentions=tuple(_attention(graph, node, makers) for node in attentions),
        feed_forwards=_feed_forwards(graph, makers),
        bias=biases[0] if biases else None,
        streams=_streams(graph, attentions, makers),
    )


def layer_of(name: str) -> tuple[str, int, str] | None:
    """Stem, number and rest of a tensor's name.

    >>> layer_of("model.layers.3.mlp.up_proj.weight")
    ('model.layers', 3, 'mlp.up_proj.weight')
    """
    match = _LAYER.match(name)
    return match and (match[1], int(match[2]), name[match.end() :])


def _attention(graph: Graph, node: Attention, makers: Mapping[Value, Node]) -> Part:
    (reader,) = graph.consumers()[node.out]
    assert isinstance(reader, Linear), f"{reader.op} reads attention"
    shared = node.num_heads // node.num_kv_heads
    query, key, value = (_linear_of(x, makers) for x in (node.q, node.k, node.v))
    return Part(
        layer=node.layer_index,
        makers=((query, shared * node.head_dim), (key, node.head_dim), (value, node.head_dim)),
        reader=reader,
        num_units=node.num_kv_heads,
        width=shared * node.head_dim,
    )


def _feed_forwards(graph: Graph, makers: Mapping[Value, Node]) -> tuple[Part, ...]:
    found: list[Part] = []
    for node in graph.nodes:
        if not isinstance(node, Linear):
            continue
        match makers[node.x]:
            case Activation(x=x):
                inputs: tuple[Value, ...] = (x,)
            case GatedActivation(gate=gate, up=up):
                inputs = (gate, up)
            case _:
                continue
        ups = tuple((_linear_of(value, makers), 1) for value in inputs)
        found.append(Part(len(found), ups, node, num_units=node.x.width, width=1))
    return tuple(found)


def _linear_of(value: Value, makers: Mapping[Value, Node]) -> Linear:
    """The linear that makes a value, which may be normed by heads and turned after it."""
    node = makers[value]
    while isinstance(node, (Rope, RmsNorm)):
        node = makers[node.x]
    if isinstance(node, Slice):
        raise UnsupportedError("structured pruning needs queries, keys, values, gate and up in matrices each")
    assert isinstance(node, Linear), f"{node.op} makes what a layer multiplies with"
    return node


def _streams(graph: Graph, attentions: list[Attention], makers: Mapping[Value, Node]) -> tuple[Value, ...]:
    """Layers that norm what they read add to what it was before; others norm what they have added."""
    readers = graph.consumers()

    def stream(x: Value) -> Value:
        norm = makers[x]
        is_added_to = any(isinstance(node, Add) for node in readers[x])
        return x if is_added_to or not isinstance(norm, (RmsNorm, LayerNorm)) else norm.x

    streams = [stream(_linear_of(node.q, makers).x) for node in attentions]
    last = next(node for node in reversed(graph.nodes) if isinstance(node, (RmsNorm, LayerNorm)))
    is_normed_first = streams[0] != _linear_of(attentions[0].q, makers).x
    return (*streams, last.x if is_normed_first else last.out)
