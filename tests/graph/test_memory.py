from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.graph.builder import GraphBuilder
from fastserve.graph.check import check_graph
from fastserve.graph.memory import Lifetimes, MemoryPlan, plan_memory, plan_strip
from fastserve.graph.node import Graph, Rows, Slice, Value
from fastserve.graph.passes import merge_linears, optimize
from tiny_models import BERT_CONFIG, LLAMA_CONFIG, tiny_graph

ROWS = {Rows.TOKENS: 5, Rows.OUTPUTS: 2, Rows.SEQUENCES: 3}


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Random graphs whose values live for random spans, with slices of slices and several outputs."""
    b = GraphBuilder()
    values = [b.embedding("token_ids", "embed", size=7, width=draw(st.integers(1, 9)))]
    for index in range(draw(st.integers(0, 20))):
        x = draw(st.sampled_from(values))
        op = draw(st.sampled_from(["linear", "add", "activation", "gather_rows", "pool"]))
        if op == "linear":
            values.append(b.linear(x, f"weight.{index}", width=draw(st.integers(1, 9))))
        elif op == "add":
            others = [y for y in values if (y.rows, y.width) == (x.rows, x.width)]
            values.append(b.add(x, draw(st.sampled_from(others))))
        elif op == "activation" or x.rows is not Rows.TOKENS:
            values.append(b.activation(x, "relu"))
        else:
            values.append(b.gather_rows(x) if op == "gather_rows" else b.pool(x, "mean"))
    outputs = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
    graph = b.finish(**{f"output_{i}": value for i, value in enumerate(outputs)})
    return _with_slices(graph) if draw(st.booleans()) else graph


def _with_slices(graph: Graph) -> Graph:
    """Merging makes slices; slicing those again makes chains."""
    merged = merge_linears(graph)
    index = merged.next_value_index()
    nodes = []
    for node in merged.nodes:
        if isinstance(node, Slice):
            middle = Value(index, node.x.rows, node.x.width - node.start)
            index += 1
            nodes += [Slice(x=node.x, start=node.start, out=middle), Slice(x=middle, start=0, out=node.out)]
        else:
            nodes.append(node)
    return Graph(tuple(nodes), merged.outputs)


def view(arena: np.ndarray, plan: MemoryPlan, value: Value) -> np.ndarray:
    """The value's elements [rows, width] within the arena of floats."""
    place = plan.placements[value]
    flat = arena[place.byte_offset // 4 :]
    shape = (ROWS[value.rows], value.width)
    strides = (4 * place.row_stride, 4)
    assert flat.size >= (shape[0] - 1) * place.row_stride + shape[1], f"{value} reaches beyond the arena"
    return np.lib.stride_tricks.as_strided(flat, shape, strides)


def replay(graph: Graph, plan: MemoryPlan) -> None:
    """Run the graph on counted numbers: whatever a node or the caller reads must be as it was written."""
    arena = np.zeros(plan.size_bytes // 4, np.float32)
    contents: dict[Value, np.ndarray] = {}
    written = 0
    for node in graph.nodes:
        if isinstance(node, Slice):
            contents[node.out] = contents[node.x][:, node.start : node.start + node.out.width]
            continue
        for value in node.outputs():
            shape = (ROWS[value.rows], value.width)
            contents[value] = np.arange(written, written + shape[0] * shape[1], dtype=np.float32).reshape(
                shape
            )
            written += contents[value].size
            view(arena, plan, value)[:] = contents[value]
        for value in node.inputs():  # checked after the outputs are written: they must not share memory
            np.testing.assert_array_equal(view(arena, plan, value), contents[value])
    for value in graph.outputs.values():
        np.testing.assert_array_equal(view(arena, plan, value), contents[value])


@given(graphs(), st.sampled_from([4, 64]))
def test_every_value_is_intact_when_it_is_read(graph: Graph, alignment: int) -> None:
    check_graph(graph)
    plan = plan_memory(graph, ROWS, alignment=alignment)
    replay(graph, plan)
    sliced = {node.out for node in graph.nodes if isinstance(node, Slice)}
    assert all(
        place.byte_offset % alignment == 0 for value, place in plan.placements.items() if value not in sliced
    )


def spans(graph: Graph) -> dict[Value, tuple[int, int]]:
    """The first and the last node to write or read each value or a slice; outputs are read at the end."""
    owner: dict[Value, Value] = {}
    found: dict[Value, tuple[int, int]] = {}
    for position, node in enumerate(graph.nodes):
        for value in node.outputs():
            owner[value] = owner[node.x] if isinstance(node, Slice) else value
        for value in (*node.inputs(), *node.outputs()):
            first, _ = found.get(owner[value], (position, position))
            found[owner[value]] = first, position
    for value in graph.outputs.values():
        found[owner[value]] = found[owner[value]][0], len(graph.nodes)
    return found


def byte_range(plan: MemoryPlan, value: Value) -> range:
    begin = plan.placements[value].byte_offset
    return range(begin, begin + 4 * ROWS[value.rows] * value.width)


def overlap(a: range, b: range) -> bool:
    return max(a.start, b.start) < min(a.stop, b.stop)


@given(graphs(), st.data())
def test_what_a_chain_reads_and_what_it_writes_for_others_share_no_bytes(
    graph: Graph, data: st.DataObject
) -> None:
    start, stop = sorted(data.draw(st.lists(st.integers(0, len(graph.nodes)), min_size=2, max_size=2)))
    chain = range(start, stop)
    plan = plan_memory(graph, ROWS, chains=[chain])
    replay(graph, plan)
    crossing = [
        value
        for value, (first, last) in spans(graph).items()
        if (first in chain) != (last in chain) and (first in chain or last in chain)
    ]
    for index, value in enumerate(crossing):
        for other in crossing[:index]:
            assert not overlap(byte_range(plan, value), byte_range(plan, other))


@given(graphs(), st.data())
def test_a_strip_holds_what_lives_in_its_chain_alone(graph: Graph, data: st.DataObject) -> None:
    start, stop = sorted(data.draw(st.lists(st.integers(0, len(graph.nodes)), min_size=2, max_size=2)))
    chain = range(start, stop)
    plan = plan_strip(Lifetimes.of(graph), chain, 5)
    local = {v: span for v, span in spans(graph).items() if span[0] in chain and span[1] in chain}
    owners = {value for value in plan.placements if value in spans(graph)}
    assert owners == set(local)
    for value, (first, last) in local.items():
        begin = plan.placements[value].byte_offset
        assert begin + 4 * 5 * value.width <= plan.size_bytes
        for other, (other_first, other_last) in local.items():
            if other != value and first <= other_last and other_first <= last:
                other_begin = plan.placements[other].byte_offset
                ends = begin + 20 * value.width, other_begin + 20 * other.width
                assert ends[0] <= other_begin or ends[1] <= begin


@pytest.mark.parametrize("config", [LLAMA_CONFIG, BERT_CONFIG], ids=["llama", "bert"])
def test_a_model_needs_no_more_memory_than_its_widest_node_and_residual(config: dict[str, object]) -> None:
    graph = optimize(tiny_graph(config))
    plan = plan_memory(graph, ROWS)
    replay(graph, plan)
    widest = max(
        sum(-(-ROWS[v.rows] * v.width * 4 // 64) * 64 for v in {*node.inputs(), *node.outputs()})
        for node in graph.nodes
        if not isinstance(node, Slice)
    )
    all_values = sum(ROWS[v.rows] * v.width * 4 for node in graph.nodes for v in node.outputs())
    assert plan.size_bytes <= 2 * widest
    assert plan.size_bytes < all_values / 3


def test_a_slice_of_a_slice_is_placed_in_the_value_that_owns_the_memory() -> None:
    graph = _with_slices(_two_linears())
    plan = plan_memory(graph, ROWS)
    owner = next(node.out for node in graph.nodes if node.op == "linear")
    second = graph.outputs["second"]
    assert plan.placements[second].byte_offset == plan.placements[owner].byte_offset + 3 * 4
    assert plan.placements[second].row_stride == owner.width == 3 + 5


def _two_linears() -> Graph:
    b = GraphBuilder()
    x = b.embedding("token_ids", "embed", size=7, width=4)
    return b.finish(first=b.linear(x, "first", width=3), second=b.linear(x, "second", width=5))
