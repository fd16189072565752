"""Turning queries and keys within attention changes which calls run, never a bit of what they compute."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from fastserve import _native
from fastserve.backends.native import executable as native
from fastserve.backends.native import fuse
from fastserve.backends.native.fuse_rope_attention import RopeAttention, fuse_rope_attention
from fastserve.config import KvDtype
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Graph, RopeTable
from fastserve.types import Float32Array, Limits
from native_graphs import VOCAB, misaligned, random_parameters
from parity import run_logits, store_f32

LIMITS = Limits(max_tokens=64, max_outputs=64, max_sequences=1, num_blocks=40, max_context=512)


def make_table(dim: int) -> RopeTable:
    return RopeTable(dim, tuple(float(100.0 ** (-i / dim)) for i in range(0, dim, 2)), scale=1.25)


def rope_attention_graph(
    *, head_dim: int = 8, rotary_dim: int = 8, key_rotary_dim: int | None = None, key_is_output: bool = False
) -> Graph:
    """Six query heads and two key heads, whose result a linear reads; k may turn by a table of its own."""
    b = GraphBuilder()
    q, k, v = (misaligned(b, name, n * head_dim) for name, n in (("q", 6), ("k", 2), ("v", 2)))
    q = b.rope(q, make_table(rotary_dim), head_dim=head_dim)
    k = b.rope(k, make_table(key_rotary_dim or rotary_dim), head_dim=head_dim)
    y = b.attention(q, k, v, layer_index=0, head_dim=head_dim, scale=head_dim**-0.5, causal=True)
    outputs = {"logits": b.gather_rows(b.linear(y, "head", width=9))}
    return b.finish(**outputs, **({"k": k} if key_is_output else {}))


def run(graph: Graph, *, kv_dtype: KvDtype, isa: str, chunk: int) -> Float32Array:
    parameters = store_f32(random_parameters(graph))
    executable = native.compile_native(
        graph, parameters, weights="int8", limits=LIMITS, kv_dtype=kv_dtype, threads=2, isa=isa
    )
    return run_logits(executable, [5 * i % VOCAB for i in range(300)], chunk=chunk)


@pytest.mark.parametrize("isa", _native.runnable_isas())
@pytest.mark.parametrize("kv_dtype", get_args(KvDtype))
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(8, 8), (34, 10), (64, 64)])
def test_attention_that_turns_q_and_k_and_quantizes_its_result_has_the_same_bits(
    head_dim: int, rotary_dim: int, kv_dtype: KvDtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = rope_attention_graph(head_dim=head_dim, rotary_dim=rotary_dim)
    fused = [run(graph, kv_dtype=kv_dtype, isa=isa, chunk=chunk) for chunk in (64, 1)]
    for name in ("fuse_rope_attention", "fuse_quantize_rows"):
        monkeypatch.setattr(fuse, name, lambda graph: graph)
    expected = run(graph, kv_dtype=kv_dtype, isa=isa, chunk=64)
    for logits in fused:
        np.testing.assert_array_equal(logits, expected)


def test_both_ropes_go_into_the_attention() -> None:
    fused = fuse_rope_attention(rope_attention_graph())
    assert [node.op for node in fused.nodes if node.op in ("rope", "attention", "rope_attention")] == [
        "rope_attention"
    ]
    (node,) = (node for node in fused.nodes if isinstance(node, RopeAttention))
    assert (node.q.width, node.k.width, node.table) == (48, 16, make_table(8))


@pytest.mark.parametrize("options", [{"key_rotary_dim": 4}, {"key_is_output": True}])
def test_ropes_by_two_tables_and_ropes_that_others_read_stay(options: dict[str, int]) -> None:
    graph = rope_attention_graph(**options)  # type: ignore[arg-type]
    assert fuse_rope_attention(graph) == graph
