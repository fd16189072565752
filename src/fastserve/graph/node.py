"""The computation as data: one frozen dataclass an op, over values whose first dimension is rows.

A value is a matrix [rows, width]. Rows are tokens of the flat batch, its output rows, or its sequences; there
is no batch dimension and no padding. Every value is written by exactly one node; a graph's nodes are in
execution order. In a node, fields of type `Value` are inputs unless their name starts with `out`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Literal, Self


class Rows(Enum):
    """What the rows of a value are."""

    TOKENS = "tokens"
    OUTPUTS = "outputs"  # the rows named by Batch.output_rows
    SEQUENCES = "sequences"


ActivationKind = Literal["silu", "gelu", "gelu_tanh", "relu", "tanh", "sigmoid"]
IdSource = Literal["token_ids", "positions", "token_types"]
PoolKind = Literal["mean", "first", "last"]


@dataclass(frozen=True, slots=True)
class Value:
    """A matrix [rows, width] of float32, named by its index within the graph."""

    index: int
    rows: Rows
    width: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """A stored tensor, or several stacked along their first dimension (after merging): never its contents.

    How the weights are stored (f32, int8, ...) is not the graph's business.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]  # [out, in] for a matrix, [width] for a vector

    @classmethod
    def stack(cls, parameters: Sequence[Parameter]) -> Parameter:
        """Several, the rows of one below those of the other."""
        names = tuple(name for parameter in parameters for name in parameter.names)
        num_rows = sum(parameter.shape[0] for parameter in parameters)
        return cls(names, (num_rows, *parameters[0].shape[1:]))


@dataclass(frozen=True, slots=True)
class RelativeBias:
    """Relative position bias (T5, arXiv 1910.10683, section 2.1; MPNet has the same): head h adds
    weight[bucket(key position - query position), h] to its scores.

    Bidirectional, half of the buckets are for keys before the query and half for those after it; else keys
    after the query share the bucket of its own position. Half of a side's buckets have one distance each;
    the other half share those up to `max_distance` logarithmically, the last bucket all beyond
    (`fastserve.backends.relative_bias`).
    """

    weight: Parameter  # [num_buckets, num_heads]
    max_distance: int
    bidirectional: bool

    @property
    def num_buckets(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Base of the ops: inputs, outputs and parameters by field."""

    @property
    def op(self) -> str:
        """The op's name, the same in passes, kernels, bindings, tests and benchmarks: `AddRmsNorm` is
        `add_rms_norm`."""
        name = type(self).__name__
        return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))

    def inputs(self) -> tuple[Value, ...]:
        return tuple(value for name, value in self._values() if not name.startswith("out"))

    def outputs(self) -> tuple[Value, ...]:
        return tuple(value for name, value in self._values() if name.startswith("out"))

    def parameters(self) -> tuple[Parameter, ...]:
        found: list[Parameter] = []
        for f in fields(self):
            match getattr(self, f.name):
                case Parameter() as parameter:
                    found.append(parameter)
                case RelativeBias(weight=parameter):
                    found.append(parameter)
                case tuple() as several:  # of experts
                    found += (item for item in several if isinstance(item, Parameter))
        return tuple(found)

    def with_values(self, change: Callable[[Value], Value]) -> Self:
        """This node with every value v replaced by change(v)."""
        return replace(self, **{name: change(value) for name, value in self._values()})

    def with_inputs(self, change: Callable[[Value], Value]) -> Self:
        """This node with every input v replaced by change(v)."""
        inputs = {n: change(v) for n, v in self._values() if not n.startswith("out")}
        return replace(self, **inputs)

    def _values(self) -> Iterator[tuple[str, Value]]:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Value):
                yield f.name, value


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding(Node):
    """out[t] = weight[ids[t] + offset] * scale."""

    ids: IdSource
    weight: Parameter
    # Of positions: above 0 where a table's first rows are for something else (RoBERTa, OPT), below 0 where a
    # sequence's first slots are empty (`leave_slots_empty`).
    offset: int = 0
    scale: float = 1.0
    out: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear(Node):
    """out = x @ weight.T + bias."""

    x: Value
    weight: Parameter
    bias: Parameter | None = None
    out: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterDown(Node):
    """out[r] = down @ x[r], where `down` [rank, in] is what the adapter of row r's sequence has for the
    linear of `weight`: the first half of a low-rank product (LoRA, arXiv 2106.09685, section 4.1).

    Which adapter that is, `Batch.adapter_slots` says. The adapter's ranks, of all parts of the weight that it
    changes, are the first columns of `out`; nothing may be read of the others, nor of rows without one.
    """

    x: Value
    weight: Parameter
    out: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedLinear(Linear):
    """out = x @ weight.T + bias, and where the row's sequence has an adapter for this weight, factors * that
    + shifts + up @ low: `low` is what AdapterDown made of x. An adapter without factors only adds. Made by
    `add_adapters`."""

    low: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class RmsNorm(Node):
    """out = x / sqrt(mean(x^2) + eps) * (offset + weight) (arXiv 1910.07467).

    A weight of [group], where group divides x.width, norms every so many columns by themselves: the heads of
    queries and keys.
    """

    x: Value
    weight: Parameter
    eps: float
    offset: float = 0.0
    out: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNorm(Node):
    """out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias (arXiv 1607.06450)."""

    x: Value
    weight: Parameter
    bias: Parameter | None
    eps: float
    out: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Add(Node):
    """out = x + y."""

    x: Value
    y: Value
    out: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class AddRmsNorm(Node):
    """out_sum = x + y; out = rms_norm(out_sum). Made by fusion; `out_sum` is None where nobody reads it."""

    x: Value
    y: Value
    weight: Parameter
    eps: float
    offset: float = 0.0
    out_sum: Value | None
    out: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class AddLayerNorm(Node):
    """out_sum = x + y; out = layer_norm(out_sum). Made by fusion; `out_sum` is None where nobody reads it."""

    x: Value
    y: Value
    weight: Parameter
    bias: Parameter | None
    eps: float
    out_sum: Value | None
    out: Value


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Rotary position embedding (arXiv 2104.09864), halves layout: dimension i turns with i + dim / 2.

    `dim` may be smaller than the head (partial rotary: the first `dim` dimensions turn). Angles are
    (position + offset) * inverse_frequencies[i], in float32; cosines and sines are multiplied by `scale`.
    """

    dim: int
    inverse_frequencies: tuple[float, ...]  # [dim / 2]
    scale: float = 1.0
    offset: int = 0  # below 0 where a sequence's first slots are empty


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope(Node):
    """Turns every head of x by its token's position."""

    x: Value
    table: RopeTable
    head_dim: int
    out: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention(Node):
    """Writes k and v into layer `layer_index` of the KV pool, then attends over the sequence's blocks, read
    as they are stored.

    Query head h reads key head h * num_kv_heads // num_heads. Causal attention of position p sees 0..p;
    bidirectional attention (encoders) sees the whole sequence, which must then be in one batch. With a
    `window`, causal attention of p sees p - window + 1 .. p, bidirectional p - window .. p + window. Nobody
    sees the slots before `first_key`, which are empty.

    Scores are q * k * scale; then, with a `soft_cap`, soft_cap * tanh(scores / soft_cap) (Gemma 2, arXiv
    2408.00118); then the `bias` is added.
    """

    q: Value  # [tokens, num_heads * head_dim]
    k: Value  # [tokens, num_kv_heads * head_dim]
    v: Value  # [tokens, num_kv_heads * head_dim]
    layer_index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    causal: bool
    window: int | None = None
    soft_cap: float | None = None
    bias: RelativeBias | None = None
    first_key: int = 0
    out: Value  # [tokens, num_heads * head_dim]

    @property
    def pool_layer(self) -> int:
        """The layer of the KV pool that it uses. Bidirectional attention reads nothing of earlier steps, so
        all of its layers share the first."""
        return self.layer_index if self.causal else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSource(Node):
    """Writes keys and values of a whole source, which an encoder has read, into layer `layer_index` of the
    KV pool: what the decoder's CrossAttention of that layer reads, step by step.

    It comes after all attention of its graph, whose keys and values lie in the same blocks and are needed no
    more. Nothing is defined by it.
    """

    k: Value  # [tokens, num_kv_heads * head_dim]
    v: Value  # [tokens, num_kv_heads * head_dim]
    layer_index: int
    num_kv_heads: int
    head_dim: int

    @property
    def pool_layer(self) -> int:
        return self.layer_index


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossAttention(Node):
    """Attends over the whole source of each sequence (Batch.source_lengths, source_block_tables), read as
    `StoreSource` has written it into layer `layer_index`: without mask, bias or positions (arXiv 1706.03762,
    section 3.2.3). Scores are q * k * scale.

    The layer is that of the decoder's own attention: a block holds keys and values of a source or of a
    target, never of both.
    """

    q: Value  # [tokens, num_heads * head_dim]
    layer_index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    out: Value  # [tokens, num_heads * head_dim]

    @property
    def pool_layer(self) -> int:
        return self.layer_index


PoolNode = Attention | StoreSource | CrossAttention
"""What reads or writes the KV pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation(Node):
    """out = kind(x)."""

    x: Value
    kind: ActivationKind
    out: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedActivation(Node):
    """out = kind(gate) * up. A gate of one column is for the whole row."""

    gate: Value
    up: Value
    kind: ActivationKind
    out: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureOfExperts(Node):
    """Row by row, out = sum of share(e) * downs[e](kind(gates[e](x)) * ups[e](x)) over the `top_k` experts e
    that have the largest of softmax(router(x)) (Mixtral, arXiv 2401.04088, section 2.1).

    An expert's share is that probability; `normalized`, it is divided by the sum of those of the chosen ones,
    which makes it a softmax of their logits alone.
    """

    x: Value
    router: Parameter  # [experts, width]
    gates: tuple[Parameter, ...]  # of each expert, [inner width, width]
    ups: tuple[Parameter, ...]
    downs: tuple[Parameter, ...]  # [width, inner width]
    top_k: int
    normalized: bool
    kind: ActivationKind
    out: Value

    @property
    def num_experts(self) -> int:
        return len(self.gates)


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftCap(Node):
    """out = cap * tanh(x / cap): no element's magnitude exceeds cap (Gemma 2, arXiv 2408.00118)."""

    x: Value
    cap: float
    out: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale(Node):
    """out = x * factor, where no weight can take the factor."""

    x: Value
    factor: float
    out: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice(Node):
    """out = x[:, start : start + out.width]. A view: it costs nothing and owns no memory."""

    x: Value
    start: int
    out: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class GatherRows(Node):
    """out[r] = x[output_rows[r]]: from token rows to output rows."""

    x: Value
    out: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool(Node):
    """From token rows to one row a sequence: their mean, or the first or last of them."""

    x: Value
    kind: PoolKind
    out: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class L2Normalize(Node):
    """out = x / max(|x|_2, eps), row by row."""

    x: Value
    eps: float
    out: Value


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes in execution order, and the values that the caller reads, by name."""

    nodes: tuple[Node, ...]
    outputs: dict[str, Value]

    def consumers(self) -> dict[Value, list[Node]]:
        """Who reads each value. The graph's own outputs are not nodes and do not count."""
        readers: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for value in node.inputs():
                readers.setdefault(value, []).append(node)
        return readers

    def producers(self) -> dict[Value, Node]:
        return {value: node for node in self.nodes for value in node.outputs()}

    def head(self) -> Linear | None:
        """The linear that makes the logits: rows may be chosen, and numbers capped, after it."""
        if "logits" not in self.outputs:
            return None
        makers = self.producers()
        node = makers[self.outputs["logits"]]
        while isinstance(node, (GatherRows, SoftCap, Scale)):
            node = makers[node.x]
        return node if isinstance(node, Linear) else None

    def beside(self, other: Graph) -> Graph:
        """The nodes of both, with this one's outputs: for what is asked of the weights of both at once."""
        shift = self.next_value_index()
        others = (
            node.with_values(lambda value: replace(value, index=value.index + shift)) for node in other.nodes
        )
        return Graph((*self.nodes, *others), dict(self.outputs))

    def next_value_index(self) -> int:
        return 1 + max((v.index for node in self.nodes for v in node.outputs()), default=-1)
