"""What follows an encoder's token vectors: one embedding a text, or the logits of a classic task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fastserve.errors import UnsupportedError
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import (
    ActivationKind,
    GatherRows,
    Graph,
    Linear,
    Parameter,
    Pool,
    PoolKind,
    Rows,
    SoftCap,
    Value,
)
from fastserve.graph.passes.drop_dead_nodes import drop_dead_nodes
from fastserve.models.pooling import Pooling

NORMALIZE_EPS = 1e-12  # of torch.nn.functional.normalize, which sentence-transformers calls

HeadKind = Literal["sequence-classification", "token-classification", "question-answering", "multiple-choice"]


@dataclass(frozen=True, slots=True)
class Head:
    """The trained ending of a model for a task: its kind, and how many logits it gives."""

    kind: HeadKind
    num_labels: int

    @property
    def is_per_token(self) -> bool:
        """Whether there is a row of logits for each token; else one for each sequence."""
        return self.kind in ("token-classification", "question-answering")


Ending = Pooling | Head


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLayout:
    """How a family arranges the layers of one kind of head, by the names of their tensors without `.weight`.

    The token vectors are pooled (`pool`; None: a row of logits a token), go through a linear layer and its
    activation, then a norm, each where there is one, then through the linear layer that gives the logits.
    """

    pool: PoolKind | None
    dense: str | None = None
    has_dense_bias: bool = True
    activation: ActivationKind = "tanh"
    norm: str | None = None
    has_norm_bias: bool = True
    norm_eps: float = 1e-5
    classifier: str = "classifier"


HeadLayouts = Mapping[HeadKind, HeadLayout]


def finish_with_embedding(b: GraphBuilder, x: Value, pooling: Pooling) -> Graph:
    """End a graph with `embedding` [sequences, width], of token vectors x [tokens, width]."""
    embedding = b.pool(x, pooling.kind)
    if pooling.normalize:
        embedding = b.l2_normalize(embedding, eps=NORMALIZE_EPS)
    return b.finish(embedding=embedding)


def finish_with_head(b: GraphBuilder, x: Value, head: Head, layout: HeadLayout) -> Graph:
    """End a graph with `logits` [sequences or tokens, num_labels], of token vectors x [tokens, width]."""
    if layout.pool is not None:
        x = b.pool(x, layout.pool)
    if layout.dense is not None:
        bias = f"{layout.dense}.bias" if layout.has_dense_bias else None
        x = b.linear(x, f"{layout.dense}.weight", bias=bias, width=x.width)
        x = b.activation(x, layout.activation)
    if layout.norm is not None:
        bias = f"{layout.norm}.bias" if layout.has_norm_bias else None
        x = b.layer_norm(x, f"{layout.norm}.weight", bias, eps=layout.norm_eps)
    classifier = layout.classifier
    logits = b.linear(x, f"{classifier}.weight", bias=f"{classifier}.bias", width=head.num_labels)
    return b.finish(logits=logits)


def replace_language_head(graph: Graph, head: Head) -> Graph:
    """A decoder's graph with `logits` [sequences, num_labels] instead of those of its vocabulary: what
    `LlamaForSequenceClassification` and its like compute, of the last token's vector.

    Raises:
        UnsupportedError: a head of another kind.
    """
    if head.kind != "sequence-classification":
        raise UnsupportedError(
            f"a decoder for {head.kind} is not supported", hint="supported is sequence-classification"
        )
    producers = graph.producers()
    node = producers[graph.outputs["logits"]]
    while not isinstance(node, Linear):
        assert isinstance(node, GatherRows | SoftCap), f"{node.op} follows the head"
        node = producers[node.x]
    x, index = node.x, graph.next_value_index()
    last = Value(index, Rows.SEQUENCES, x.width)
    logits = Value(index + 1, Rows.SEQUENCES, head.num_labels)
    weight = Parameter(("score.weight",), (head.num_labels, x.width))
    nodes = (*graph.nodes, Pool(x=x, kind="last", out=last), Linear(x=last, weight=weight, out=logits))
    return drop_dead_nodes(Graph(nodes, {"logits": logits}))
