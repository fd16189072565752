from __future__ import annotations

from dataclasses import replace

import pytest

from fastserve.graph.check import check_graph
from fastserve.graph.node import Add, Attention, Embedding, Graph, Linear, Parameter, Rows, Slice, Value
from tiny_models import BERT_CONFIG, LLAMA_CONFIG, tiny_graph

X = Value(0, Rows.TOKENS, 4)
EMBEDDING = Embedding(ids="token_ids", weight=Parameter(("embed",), (9, 4)), out=X)


def graph_of(*nodes: object, output: Value = X) -> Graph:
    return Graph((EMBEDDING, *nodes), {"out": output})  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [LLAMA_CONFIG, BERT_CONFIG], ids=["llama", "bert"])
def test_the_graphs_of_families_are_sound(config: dict[str, object]) -> None:
    check_graph(tiny_graph(config))


def test_a_value_read_before_it_is_defined_is_named() -> None:
    late = Value(7, Rows.TOKENS, 4)
    with pytest.raises(AssertionError, match=r"node 1 \(add\) reads Value\(index=7"):
        check_graph(graph_of(Add(x=X, y=late, out=Value(1, Rows.TOKENS, 4))))


def test_a_value_defined_twice_is_named() -> None:
    with pytest.raises(AssertionError, match="defines value 0 a second time"):
        check_graph(graph_of(EMBEDDING))


def test_an_output_that_nobody_defines_is_named() -> None:
    with pytest.raises(AssertionError, match="output out is Value"):
        check_graph(graph_of(output=Value(3, Rows.TOKENS, 4)))


@pytest.mark.parametrize(
    "node",
    [
        Add(x=X, y=X, out=Value(1, Rows.TOKENS, 5)),
        Add(x=X, y=X, out=Value(1, Rows.OUTPUTS, 4)),
        Linear(x=X, weight=Parameter(("w",), (4, 3)), out=Value(1, Rows.TOKENS, 4)),
        Linear(
            x=X,
            weight=Parameter(("w",), (4, 4)),
            bias=Parameter(("b",), (3,)),
            out=Value(1, Rows.TOKENS, 4),
        ),
        Slice(x=X, start=2, out=Value(1, Rows.TOKENS, 3)),
    ],
    ids=lambda node: node.op,
)
def test_rows_and_widths_that_do_not_fit_are_refused(node: object) -> None:
    with pytest.raises(AssertionError, match="do not fit"):
        check_graph(graph_of(node))


def test_attention_heads_that_do_not_divide_are_refused() -> None:
    graph = tiny_graph(LLAMA_CONFIG)
    nodes = tuple(replace(n, num_kv_heads=3) if isinstance(n, Attention) else n for n in graph.nodes)
    with pytest.raises(AssertionError, match="attention"):
        check_graph(Graph(nodes, graph.outputs))
