"""Builds a graph op by op: one method an op, named as the op; each returns the value it defines."""

from __future__ import annotations

from collections.abc import Sequence

from fastserve.graph.node import (
    Activation,
    ActivationKind,
    Add,
    Attention,
    CrossAttention,
    Embedding,
    GatedActivation,
    GatherRows,
    Graph,
    IdSource,
    L2Normalize,
    LayerNorm,
    Linear,
    MixtureOfExperts,
    Node,
    Parameter,
    Pool,
    PoolKind,
    RelativeBias,
    RmsNorm,
    Rope,
    RopeTable,
    Rows,
    Scale,
    Slice,
    SoftCap,
    StoreSource,
    Value,
)


class GraphBuilder:
    """
    >>> b = GraphBuilder()
    >>> x = b.embedding("token_ids", "embed.weight", size=512, width=64)
    >>> graph = b.finish(logits=b.gather_rows(b.linear(x, "head.weight", width=512)))
    >>> [node.op for node in graph.nodes]
    ['embedding', 'linear', 'gather_rows']
    """

    def __init__(self) -> None:
        self._nodes: list[Node] = []
        self._num_values = 0

    def finish(self, **outputs: Value) -> Graph:
        return Graph(tuple(self._nodes), dict(outputs))

    def embedding(
        self, ids: IdSource, weight: str, *, size: int, width: int, offset: int = 0, scale: float = 1.0
    ) -> Value:
        out = self._value(Rows.TOKENS, width)
        parameter = Parameter((weight,), (size, width))
        return self._add(Embedding(ids=ids, weight=parameter, offset=offset, scale=scale, out=out), out)

    def linear(self, x: Value, weight: str, *, width: int, bias: str | None = None) -> Value:
        out = self._value(x.rows, width)
        node = Linear(
            x=x,
            weight=Parameter((weight,), (width, x.width)),
            bias=Parameter((bias,), (width,)) if bias else None,
            out=out,
        )
        return self._add(node, out)

    def rms_norm(
        self, x: Value, weight: str, *, eps: float, offset: float = 0.0, group: int | None = None
    ) -> Value:
        """`group`: columns that are normed by themselves, such as a head's; None: all."""
        out = self._value(x.rows, x.width)
        parameter = Parameter((weight,), (group or x.width,))
        return self._add(RmsNorm(x=x, weight=parameter, eps=eps, offset=offset, out=out), out)

    def layer_norm(self, x: Value, weight: str, bias: str | None, *, eps: float) -> Value:
        out = self._value(x.rows, x.width)
        shape = (x.width,)
        node = LayerNorm(
            x=x,
            weight=Parameter((weight,), shape),
            bias=Parameter((bias,), shape) if bias else None,
            eps=eps,
            out=out,
        )
        return self._add(node, out)

    def add(self, x: Value, y: Value) -> Value:
        out = self._value(x.rows, x.width)
        return self._add(Add(x=x, y=y, out=out), out)

    def rope(self, x: Value, table: RopeTable, *, head_dim: int) -> Value:
        out = self._value(x.rows, x.width)
        return self._add(Rope(x=x, table=table, head_dim=head_dim, out=out), out)

    def attention(
        self,
        q: Value,
        k: Value,
        v: Value,
        *,
        layer_index: int,
        head_dim: int,
        scale: float,
        causal: bool,
        window: int | None = None,
        soft_cap: float | None = None,
        bias: RelativeBias | None = None,
    ) -> Value:
        out = self._value(q.rows, q.width)
        node = Attention(
            q=q,
            k=k,
            v=v,
            layer_index=layer_index,
            num_heads=q.width // head_dim,
            num_kv_heads=k.width // head_dim,
            head_dim=head_dim,
            scale=scale,
            causal=causal,
            window=window,
            soft_cap=soft_cap,
            bias=bias,
            out=out,
        )
        return self._add(node, out)

    def store_source(self, k: Value, v: Value, *, layer_index: int, head_dim: int) -> None:
        node = StoreSource(
            k=k, v=v, layer_index=layer_index, num_kv_heads=k.width // head_dim, head_dim=head_dim
        )
        self._nodes.append(node)

    def cross_attention(self, q: Value, *, layer_index: int, head_dim: int, scale: float) -> Value:
        """Of as many key heads as query heads."""
        out = self._value(q.rows, q.width)
        num_heads = q.width // head_dim
        node = CrossAttention(
            q=q,
            layer_index=layer_index,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            scale=scale,
            out=out,
        )
        return self._add(node, out)

    def activation(self, x: Value, kind: ActivationKind) -> Value:
        out = self._value(x.rows, x.width)
        return self._add(Activation(x=x, kind=kind, out=out), out)

    def gated_activation(self, gate: Value, up: Value, kind: ActivationKind) -> Value:
        out = self._value(up.rows, up.width)
        return self._add(GatedActivation(gate=gate, up=up, kind=kind, out=out), out)

    def mixture_of_experts(
        self,
        x: Value,
        router: str,
        gates: Sequence[str],
        ups: Sequence[str],
        downs: Sequence[str],
        *,
        inner_width: int,
        top_k: int,
        normalized: bool,
        kind: ActivationKind,
    ) -> Value:
        """`gates`, `ups` and `downs` name the weights of each expert."""
        out = self._value(x.rows, x.width)
        node = MixtureOfExperts(
            x=x,
            router=Parameter((router,), (len(gates), x.width)),
            gates=tuple(Parameter((name,), (inner_width, x.width)) for name in gates),
            ups=tuple(Parameter((name,), (inner_width, x.width)) for name in ups),
            downs=tuple(Parameter((name,), (x.width, inner_width)) for name in downs),
            top_k=top_k,
            normalized=normalized,
            kind=kind,
            out=out,
        )
        return self._add(node, out)

    def soft_cap(self, x: Value, cap: float) -> Value:
        out = self._value(x.rows, x.width)
        return self._add(SoftCap(x=x, cap=cap, out=out), out)

    def scale(self, x: Value, factor: float) -> Value:
        out = self._value(x.rows, x.width)
        return self._add(Scale(x=x, factor=factor, out=out), out)

    def slice(self, x: Value, start: int, *, width: int) -> Value:
        out = self._value(x.rows, width)
        return self._add(Slice(x=x, start=start, out=out), out)

    def gather_rows(self, x: Value) -> Value:
        out = self._value(Rows.OUTPUTS, x.width)
        return self._add(GatherRows(x=x, out=out), out)

    def pool(self, x: Value, kind: PoolKind) -> Value:
        out = self._value(Rows.SEQUENCES, x.width)
        return self._add(Pool(x=x, kind=kind, out=out), out)

    def l2_normalize(self, x: Value, *, eps: float) -> Value:
        out = self._value(x.rows, x.width)
        return self._add(L2Normalize(x=x, eps=eps, out=out), out)

    def _value(self, rows: Rows, width: int) -> Value:
        self._num_values += 1
        return Value(self._num_values - 1, rows, width)

    def _add(self, node: Node, out: Value) -> Value:
        self._nodes.append(node)
        return out
