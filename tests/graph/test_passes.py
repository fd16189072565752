from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from decoder_configs import GEMMA3, GPT2, OPT
from fastserve.backends.torch.executable import compile_torch
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.check import check_graph
from fastserve.graph.node import AdapterDown, GatherRows, Graph, Linear, Rows, Slice
from fastserve.graph.passes import (
    add_adapters,
    drop_dead_nodes,
    fuse_add_norm,
    hoist_gather_rows,
    leave_slots_empty,
    merge_linears,
    optimize,
)
from fastserve.types import Batch, Float32Array, Limits
from parity import Run, make_batch
from tiny_models import BERT_CONFIG, LLAMA_CONFIG, random_parameters, tiny_graph

Pass = Callable[[Graph], Graph]

PASSES = [drop_dead_nodes, hoist_gather_rows, merge_linears, fuse_add_norm, optimize]
CONFIGS = {
    "llama": LLAMA_CONFIG,
    "llama with biases and tied head": {
        **LLAMA_CONFIG,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "bert": BERT_CONFIG,
}


def count_ops(graph: Graph) -> Counter[str]:
    return Counter(node.op for node in graph.nodes)


def op_rows(graph: Graph) -> list[tuple[str, Rows]]:
    return [(node.op, node.outputs()[0].rows) for node in graph.nodes]


def run_outputs(graph: Graph, parameters: dict[str, Float32Array]) -> dict[str, Float32Array]:
    """Two sequences in one batch; output rows are some of theirs, out of order."""
    executable = compile_torch(graph, parameters, limits=Limits(num_blocks=8), block_size=4)
    batch = make_batch([(Run(executable, 0), [5, 1, 96, 7, 3]), (Run(executable, 1), [2, 2, 50])])
    outputs = executable.run(replace(batch, output_rows=np.array([7, 4, 0], np.int32))).outputs
    return dict(outputs)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("apply", PASSES)
def test_a_pass_keeps_the_graph_sound_and_its_outputs_unchanged(apply: Pass, name: str) -> None:
    graph = tiny_graph(CONFIGS[name])
    parameters = random_parameters(graph)
    passed = apply(graph)
    check_graph(passed)
    expected, actual = run_outputs(graph, parameters), run_outputs(passed, parameters)
    assert actual.keys() == expected.keys()
    for output, array in expected.items():
        np.testing.assert_allclose(actual[output], array, rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", [[3, 2, 1, 0], [2, 3, 1, 0], [3, 1, 2, 0]])
def test_passes_keep_outputs_in_any_order(order: list[int]) -> None:
    graph = passed = tiny_graph(LLAMA_CONFIG)
    for index in order:
        passed = PASSES[index](passed)
        check_graph(passed)
    parameters = random_parameters(graph)
    np.testing.assert_allclose(
        run_outputs(passed, parameters)["logits"],
        run_outputs(graph, parameters)["logits"],
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_optimizing_twice_leaves_the_same_ops_on_the_same_rows(name: str) -> None:
    once = optimize(tiny_graph(CONFIGS[name]))
    assert op_rows(optimize(once)) == op_rows(once)


def test_merge_linears_leaves_four_linears_a_llama_layer_and_one_head() -> None:
    merged = merge_linears(tiny_graph(LLAMA_CONFIG))
    assert count_ops(merged)["linear"] == 3 * 4 + 1
    assert count_ops(merged)["slice"] == 3 * (3 + 2)
    qkv = next(node for node in merged.nodes if isinstance(node, Linear))
    assert qkv.weight.names == tuple(
        f"model.layers.0.self_attn.{part}_proj.weight" for part in ("q", "k", "v")
    )
    assert qkv.weight.shape == (24 + 12 + 12, 24)
    assert [n.start for n in merged.nodes if isinstance(n, Slice)][:3] == [0, 24, 36]


def test_merge_linears_keeps_those_with_and_without_bias_apart() -> None:
    b = GraphBuilder()
    x = b.embedding("token_ids", "embed", size=5, width=4)
    outputs = {
        "p": b.linear(x, "p", width=2, bias="p.bias"),
        "q": b.linear(x, "q", width=3),
        "r": b.linear(x, "r", width=4, bias="r.bias"),
    }
    merged = merge_linears(b.finish(**outputs))
    check_graph(merged)
    linears = [node for node in merged.nodes if isinstance(node, Linear)]
    assert [node.weight.names for node in linears] == [("p", "r"), ("q",)]
    assert linears[0].bias is not None
    assert linears[0].bias.names == ("p.bias", "r.bias")


def test_fuse_add_norm_leaves_no_norm_but_the_first_of_a_llama() -> None:
    ops = count_ops(fuse_add_norm(tiny_graph(LLAMA_CONFIG)))
    assert (ops["add"], ops["rms_norm"], ops["add_rms_norm"]) == (0, 1, 2 * 3)


def test_fuse_add_norm_gives_the_sum_only_where_it_is_read() -> None:
    b = GraphBuilder()
    x = b.embedding("token_ids", "embed", size=5, width=4)
    read, unread, output = b.add(x, x), b.add(x, x), b.add(x, x)
    normed = [b.rms_norm(total, f"norm.{i}", eps=1e-5) for i, total in enumerate((read, unread, output))]
    total = b.add(b.add(read, normed[0]), b.add(normed[1], normed[2]))
    fused = fuse_add_norm(b.finish(total=total, output=output))
    check_graph(fused)
    sums = [node.out_sum for node in fused.nodes if node.op == "add_rms_norm"]
    assert sums == [read, None, output]


def test_hoist_gather_rows_runs_only_the_last_attention_and_what_precedes_it_in_token_rows() -> None:
    hoisted = hoist_gather_rows(tiny_graph(LLAMA_CONFIG))
    rows = op_rows(hoisted)
    last_attention = max(i for i, (op, _) in enumerate(rows) if op == "attention")
    assert {row for _, row in rows[: last_attention + 1]} == {Rows.TOKENS}
    assert {row for _, row in rows[last_attention + 1 :]} == {Rows.OUTPUTS}
    assert count_ops(hoisted)["gather_rows"] == 2  # the attention's result and the residual beside it


def test_hoist_gather_rows_stays_below_a_value_that_is_needed_in_token_rows() -> None:
    b = GraphBuilder()
    x = b.embedding("token_ids", "embed", size=5, width=4)
    hidden = b.activation(x, "silu")
    logits = b.gather_rows(b.linear(hidden, "head", width=5))
    hoisted = hoist_gather_rows(b.finish(logits=logits, hidden=hidden))
    check_graph(hoisted)
    assert [node.op for node in hoisted.nodes] == ["embedding", "activation", "gather_rows", "linear"]
    assert hoisted.outputs["hidden"] == hidden


def test_hoist_gather_rows_gathers_a_slice_rather_than_the_wider_value_it_views() -> None:
    graph = hoist_gather_rows(merge_linears(_two_heads_one_in_token_rows()))
    check_graph(graph)
    (gather,) = (node for node in graph.nodes if isinstance(node, GatherRows))
    assert gather.x.width == 3


def _two_heads_one_in_token_rows() -> Graph:
    b = GraphBuilder()
    x = b.embedding("token_ids", "embed", size=5, width=4)
    narrow, wide = b.linear(x, "narrow", width=3), b.linear(x, "wide", width=7)
    return b.finish(narrow=b.gather_rows(narrow), wide=b.pool(wide, "mean"))


def test_drop_dead_nodes_drops_chains_that_no_output_depends_on() -> None:
    b = GraphBuilder()
    x = b.embedding("token_ids", "embed", size=5, width=4)
    b.activation(b.linear(x, "dead", width=9), "relu")
    graph = drop_dead_nodes(b.finish(out=b.linear(x, "live", width=3)))
    assert [p.names for node in graph.nodes for p in node.parameters()] == [("embed",), ("live",)]


def test_adapters_are_added_to_every_linear_and_change_no_value_that_others_read() -> None:
    graph = optimize(tiny_graph(LLAMA_CONFIG))
    adapted = add_adapters(graph, 8)
    check_graph(adapted)
    ops = count_ops(adapted)
    assert ops["adapted_linear"] == ops["adapter_down"] == count_ops(graph)["linear"]
    assert ops["linear"] == 0
    assert adapted.outputs == graph.outputs
    lows = [node.out.width for node in adapted.nodes if isinstance(node, AdapterDown)]
    assert lows[:4] == [3 * 8, 8, 2 * 8, 8]  # q/k/v, output, gate/up, down


def test_optimize_merges_gathers_and_fuses_a_llama() -> None:
    """Products of one input become one; the last layer's rest and the head see output rows alone."""
    graph = tiny_graph(LLAMA_CONFIG)
    optimized = optimize(graph)
    num_layers = LLAMA_CONFIG["num_hidden_layers"]
    assert count_ops(graph)["linear"] == 7 * num_layers + 1
    assert count_ops(optimized)["linear"] == 4 * num_layers + 1
    assert count_ops(optimized)["add"] == 0
    output_rows = [
        node for node in optimized.nodes if isinstance(node, Linear) and node.out.rows is Rows.OUTPUTS
    ]
    assert len(output_rows) == 4  # of the last layer: attention's output, gate and up, down; then the head


def test_a_norm_of_groups_of_columns_is_not_fused_with_the_add_before_it() -> None:
    b = GraphBuilder()
    x = b.embedding("token_ids", "x", size=97, width=8)
    normed = b.rms_norm(b.add(x, x), "norm", eps=1e-5, group=4)
    assert count_ops(fuse_add_norm(b.finish(logits=normed)))["add_rms_norm"] == 0


def test_the_offset_of_a_norm_survives_its_fusion() -> None:
    b = GraphBuilder()
    x = b.embedding("token_ids", "x", size=97, width=8)
    graph = b.finish(logits=b.gather_rows(b.rms_norm(b.add(x, x), "norm", eps=1e-5, offset=1.0)))
    parameters = random_parameters(graph)
    fused = fuse_add_norm(graph)
    assert count_ops(fused)["add_rms_norm"] == 1
    np.testing.assert_array_equal(
        run_outputs(fused, parameters)["logits"], run_outputs(graph, parameters)["logits"]
    )


def test_soft_caps_and_scales_run_for_output_rows_only() -> None:
    b = GraphBuilder()
    x = b.linear(b.embedding("token_ids", "x", size=97, width=8), "head", width=97)
    graph = b.finish(logits=b.gather_rows(b.soft_cap(b.scale(x, 0.5), 30.0)))
    rows = dict(op_rows(hoist_gather_rows(graph)))
    assert (rows["linear"], rows["scale"], rows["soft_cap"]) == (Rows.OUTPUTS,) * 3


@pytest.mark.parametrize("config", [LLAMA_CONFIG, GPT2, OPT, GEMMA3], ids=lambda config: config["model_type"])
def test_texts_after_empty_slots_are_computed_as_those_without(config: dict[str, object]) -> None:
    graph, token_ids = tiny_graph(config), np.array([5, 1, 96, 7, 3, 60], np.int32)
    parameters = random_parameters(graph)

    def run(graph: Graph, first_slot: int) -> Float32Array:
        executable = compile_torch(graph, parameters, limits=Limits(num_blocks=4), block_size=4)
        executable._kv[0].keys.fill_(1e3)  # what is in the empty slots is not seen
        slots = np.arange(first_slot, first_slot + len(token_ids), dtype=np.int32)
        batch = Batch(
            token_ids=token_ids,
            positions=slots,
            sequence_starts=np.array([0, len(token_ids)], np.int32),
            context_lengths=np.array([first_slot + len(token_ids)], np.int32),
            block_tables=np.array([[2, 0, 3]], np.int32),
            output_rows=np.arange(len(token_ids), dtype=np.int32),
        )
        return executable.run(batch).outputs["logits"]

    moved = leave_slots_empty(graph, 3)
    check_graph(moved)
    np.testing.assert_allclose(run(optimize(moved), 3), run(graph, 0), rtol=1e-4, atol=1e-5)
