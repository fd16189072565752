"""Every native op against the torch backend: each instruction set, odd sizes, misaligned rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest

from fastserve import _native
from fastserve.backends.native.executable import compile_native
from fastserve.backends.torch.executable import compile_torch
from fastserve.config import KvDtype
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Graph, Parameter, RelativeBias, RopeTable, Value
from fastserve.graph.passes import fuse_add_norm, merge_linears
from fastserve.types import NO_ADAPTER, Float32Array, Limits, LowRankMatrices
from native_graphs import VOCAB, misaligned, random_parameters
from parity import Run, make_batch, run_embeddings, run_logits, step_together, store_f32

ISAS = _native.runnable_isas()
KV_DTYPES = get_args(KvDtype)
WIDTHS = (1, 15, 16, 17, 64, 257)
LIMITS = Limits(max_tokens=64, max_outputs=64, max_sequences=4, num_blocks=128, max_context=1024)

pytestmark = pytest.mark.parametrize("isa", ISAS)


def assert_equal_to_torch(graph: Graph, isa: str, *, tolerance: float = 2e-6) -> None:
    parameters = random_parameters(graph)
    ids = np.random.default_rng(1).integers(0, VOCAB, size=13).tolist()
    actual, expected = (
        run_logits(executable, ids)
        for executable in (
            compile_native(
                graph, store_f32(parameters), weights="f32", limits=LIMITS, kv_dtype="f32", isa=isa
            ),
            compile_torch(graph, parameters, limits=LIMITS),
        )
    )
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


UNARY: Mapping[str, Callable[[GraphBuilder, Value], Value]] = {
    "rms_norm": lambda b, x: b.rms_norm(x, "norm", eps=1e-5),
    "layer_norm": lambda b, x: b.layer_norm(x, "norm", "bias", eps=1e-12),
    "rms_norm with an offset": lambda b, x: b.rms_norm(x, "norm", eps=1e-5, offset=1.0),
    "layer_norm without a bias": lambda b, x: b.layer_norm(x, "norm", None, eps=1e-12),
    "soft_cap": lambda b, x: b.soft_cap(x, 1.5),
    "scale": lambda b, x: b.scale(x, -0.3),
    "silu": lambda b, x: b.activation(x, "silu"),
    "gelu": lambda b, x: b.activation(x, "gelu"),
    "gelu_tanh": lambda b, x: b.activation(x, "gelu_tanh"),
    "relu": lambda b, x: b.activation(x, "relu"),
    "tanh": lambda b, x: b.activation(x, "tanh"),
    "sigmoid": lambda b, x: b.activation(x, "sigmoid"),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("op", UNARY)
def test_an_op_on_one_value_equals_torch(op: str, width: int, isa: str) -> None:
    b = GraphBuilder()
    assert_equal_to_torch(b.finish(logits=b.gather_rows(UNARY[op](b, misaligned(b, "x", width)))), isa)


@pytest.mark.parametrize(("group", "num_groups"), [(1, 5), (16, 3), (33, 2), (128, 4)])
def test_rms_norm_of_groups_of_columns_equals_torch(group: int, num_groups: int, isa: str) -> None:
    b = GraphBuilder()
    normed = b.rms_norm(misaligned(b, "x", group * num_groups), "norm", eps=1e-5, offset=0.5, group=group)
    assert_equal_to_torch(b.finish(logits=b.gather_rows(normed)), isa)


@pytest.mark.parametrize("width", [15, 64])
def test_embeddings_with_an_offset_and_a_scale_equal_torch(width: int, isa: str) -> None:
    b = GraphBuilder()
    words = b.embedding("token_ids", "words", size=VOCAB, width=width, scale=5.5)
    positions = b.embedding("positions", "positions", size=18, width=width, offset=3)
    assert_equal_to_torch(b.finish(logits=b.gather_rows(b.add(words, positions))), isa)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu", "tanh"])
def test_a_gated_activation_equals_torch(kind: str, width: int, isa: str) -> None:
    b = GraphBuilder()
    gate, up = misaligned(b, "gate", width), misaligned(b, "up", width, offset=5)
    assert_equal_to_torch(b.finish(logits=b.gather_rows(b.gated_activation(gate, up, kind))), isa)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("variant", [False, True])  # an offset, no bias
@pytest.mark.parametrize("keeps_sum", [True, False])
def test_add_and_norm_equal_torch_fused(
    norm: str, width: int, keeps_sum: bool, variant: bool, isa: str
) -> None:
    b = GraphBuilder()
    total = b.add(misaligned(b, "x", width), misaligned(b, "y", width, offset=1))
    normed = (
        b.rms_norm(total, "norm", eps=1e-5, offset=float(variant))
        if norm == "rms_norm"
        else b.layer_norm(total, "norm", None if variant else "bias", eps=1e-5)
    )
    graph = b.finish(logits=b.gather_rows(b.add(normed, total) if keeps_sum else normed))
    fused = fuse_add_norm(graph)
    assert f"add_{norm}" in [node.op for node in fused.nodes]
    assert_equal_to_torch(fused, isa)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_gate_of_one_column_equals_torch(width: int, isa: str) -> None:
    b = GraphBuilder()
    gate, up = misaligned(b, "gate", 1), misaligned(b, "up", width, offset=5)
    assert_equal_to_torch(b.finish(logits=b.gather_rows(b.gated_activation(gate, up, "sigmoid"))), isa)


@pytest.mark.parametrize("depth", WIDTHS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_equals_torch(depth: int, width: int, has_bias: bool, isa: str) -> None:
    b = GraphBuilder()
    x = misaligned(b, "x", depth)
    y = b.linear(x, "weight", width=width, bias="bias" if has_bias else None)
    assert_equal_to_torch(b.finish(logits=b.gather_rows(y)), isa)


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(2, 2), (8, 8), (10, 6), (64, 64), (80, 20), (34, 34)])
def test_rope_equals_torch(head_dim: int, rotary_dim: int, isa: str) -> None:
    b = GraphBuilder()
    frequencies = tuple(float(10000.0 ** (-i / rotary_dim)) for i in range(0, rotary_dim, 2))
    table = RopeTable(rotary_dim, frequencies, scale=1.25)
    y = b.rope(misaligned(b, "x", 3 * head_dim), table, head_dim=head_dim)
    assert_equal_to_torch(b.finish(logits=b.gather_rows(y)), isa)


def attention_graph(
    *, head_dim: int, num_heads: int, num_kv_heads: int, causal: bool, **features: Any
) -> Graph:
    b = GraphBuilder()
    q = misaligned(b, "q", num_heads * head_dim)
    k, v = misaligned(b, "k", num_kv_heads * head_dim), misaligned(b, "v", num_kv_heads * head_dim, offset=1)
    y = b.attention(
        q, k, v, layer_index=0, head_dim=head_dim, scale=head_dim**-0.5, causal=causal, **features
    )
    if causal:
        return b.finish(logits=b.gather_rows(y))
    return b.finish(embedding=b.l2_normalize(b.pool(y, "mean"), eps=1e-12))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (9, 3), (7, 1)])
@pytest.mark.parametrize("head_dim", [1, 3, 8, 64, 80, 256])
def test_causal_attention_equals_torch_over_blocks_and_splits(
    head_dim: int, num_heads: int, num_kv_heads: int, kv_dtype: KvDtype, isa: str
) -> None:
    graph = attention_graph(head_dim=head_dim, num_heads=num_heads, num_kv_heads=num_kv_heads, causal=True)
    parameters = random_parameters(graph)
    ids = np.random.default_rng(2).integers(0, VOCAB, size=300).tolist()  # beyond one split of 256 keys
    native = compile_native(
        graph, store_f32(parameters), weights="f32", limits=LIMITS, kv_dtype=kv_dtype, isa=isa
    )
    torch = compile_torch(graph, parameters, limits=LIMITS, kv_dtype=kv_dtype)
    expected = run_logits(torch, ids, chunk=60)
    np.testing.assert_allclose(
        run_logits(native, ids, chunk=60), expected, rtol=0, atol=4e-6 * np.abs(expected).max()
    )


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(("head_dim", "num_heads", "num_kv_heads"), [(64, 9, 3), (24, 70, 1)])
def test_long_attention_has_the_same_bits_however_it_is_cut(
    head_dim: int, num_heads: int, num_kv_heads: int, kv_dtype: KvDtype, isa: str
) -> None:
    """Prompts in any chunks, then tokens one by one; splits in one task, or each in its own and merged."""
    graph = attention_graph(head_dim=head_dim, num_heads=num_heads, num_kv_heads=num_kv_heads, causal=True)
    limits = Limits(max_tokens=1100, max_outputs=1100, max_sequences=4, num_blocks=160, max_context=1280)
    parameters = random_parameters(graph)
    ids = np.random.default_rng(4).integers(0, VOCAB, size=1100).tolist()

    def logits(threads: int, chunk: int) -> Float32Array:
        """Of the last 20 tokens, which go one by one."""
        run = Run(
            compile_native(
                graph,
                store_f32(parameters),
                weights="f32",
                limits=limits,
                kv_dtype=kv_dtype,
                threads=threads,
                isa=isa,
            )
        )
        for start in range(0, 1080, chunk):
            run.step(ids[start : min(start + chunk, 1080)])
        return np.concatenate([run.step([token]) for token in ids[1080:]])

    whole = logits(1, 1080)
    torch = compile_torch(graph, parameters, limits=limits, kv_dtype=kv_dtype)
    expected = run_logits(torch, ids)[1080:]
    np.testing.assert_allclose(whole, expected, rtol=0, atol=4e-6 * np.abs(expected).max())
    for threads, chunk in ((1, 97), (2, 350), (3, 33)):
        np.testing.assert_array_equal(logits(threads, chunk), whole)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_sequences_of_all_lengths_attend_together_as_alone(kv_dtype: KvDtype, isa: str) -> None:
    graph = attention_graph(head_dim=16, num_heads=6, num_kv_heads=2, causal=True)
    limits = Limits(max_tokens=700, max_outputs=700, max_sequences=4, num_blocks=160, max_context=1280)
    executable = compile_native(
        graph,
        store_f32(random_parameters(graph)),
        weights="f32",
        limits=limits,
        kv_dtype=kv_dtype,
        threads=2,
        isa=isa,
    )
    prompts = [[7 * i % VOCAB for i in range(n)] for n in (600, 1, 40, 257)]
    alone = [run_logits(executable, prompt)[-1] for prompt in prompts]
    runs = [Run(executable, place) for place in range(4)]
    for run, prompt in zip(runs, prompts, strict=True):
        if len(prompt) > 1:
            run.step(prompt[:-1])
    together = step_together([(run, prompt[-1:]) for run, prompt in zip(runs, prompts, strict=True)])
    for logits, expected in zip(together, alone, strict=True):
        np.testing.assert_array_equal(logits[-1], expected)


@pytest.mark.parametrize("head_dim", [8, 32, 33])
def test_bidirectional_attention_and_pooling_equal_torch(head_dim: int, isa: str) -> None:
    graph = attention_graph(head_dim=head_dim, num_heads=4, num_kv_heads=4, causal=False)
    parameters = random_parameters(graph)
    native = compile_native(
        graph, store_f32(parameters), weights="f32", limits=LIMITS, kv_dtype="f32", isa=isa
    )
    texts = [[1, 2, 3], [4], list(range(35))]
    expected = run_embeddings(compile_torch(graph, parameters, limits=LIMITS), texts)
    np.testing.assert_allclose(run_embeddings(native, texts), expected, rtol=0, atol=2e-6)


def relative_bias(num_heads: int, *, bidirectional: bool) -> RelativeBias:
    weight = Parameter(("bias",), (32, num_heads))
    return RelativeBias(weight, max_distance=128, bidirectional=bidirectional)


@pytest.mark.parametrize("kv_dtype", ["f32", "int8"])
@pytest.mark.parametrize("window", [None, 1, 40, 260, 10000])
@pytest.mark.parametrize("soft_cap", [None, 0.9])
@pytest.mark.parametrize("has_bias", [False, True])
def test_causal_attention_equals_torch_with_windows_caps_and_bias(
    window: int | None, soft_cap: float | None, has_bias: bool, kv_dtype: KvDtype, isa: str
) -> None:
    bias = relative_bias(6, bidirectional=False) if has_bias else None
    graph = attention_graph(
        head_dim=24, num_heads=6, num_kv_heads=2, causal=True, window=window, soft_cap=soft_cap, bias=bias
    )
    parameters = random_parameters(graph)
    ids = np.random.default_rng(2).integers(0, VOCAB, size=300).tolist()  # beyond one split of 256 keys
    native = compile_native(
        graph, store_f32(parameters), weights="f32", limits=LIMITS, kv_dtype=kv_dtype, isa=isa
    )
    expected = run_logits(compile_torch(graph, parameters, limits=LIMITS, kv_dtype=kv_dtype), ids, chunk=60)
    actual = run_logits(native, ids, chunk=60)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=4e-6 * np.abs(expected).max())


@pytest.mark.parametrize("window", [None, 1, 8, 40, 10000])
@pytest.mark.parametrize("soft_cap", [None, 0.9])
@pytest.mark.parametrize("has_bias", [False, True])
def test_bidirectional_attention_equals_torch_with_windows_caps_and_bias(
    window: int | None, soft_cap: float | None, has_bias: bool, isa: str
) -> None:
    bias = relative_bias(6, bidirectional=True) if has_bias else None
    b = GraphBuilder()
    q, k, v = (misaligned(b, name, 6 * 24) for name in ("q", "k", "v"))
    features: dict[str, Any] = {"window": window, "soft_cap": soft_cap, "bias": bias}
    y = b.attention(q, k, v, layer_index=0, head_dim=24, scale=0.2, causal=False, **features)
    graph = b.finish(logits=b.gather_rows(y))
    parameters = random_parameters(graph)
    limits = Limits(max_tokens=500, max_outputs=500, max_sequences=4, num_blocks=64, max_context=400)
    texts = [[7 * i % VOCAB for i in range(length)] for length in (330, 5, 1, 70)]
    results = []
    for executable in (
        compile_native(graph, store_f32(parameters), weights="f32", limits=limits, kv_dtype="f32", isa=isa),
        compile_torch(graph, parameters, limits=limits),
    ):
        turns = [(Run(executable, place), ids) for place, ids in enumerate(texts)]
        results.append(np.concatenate(step_together(turns)))
    np.testing.assert_allclose(results[0], results[1], rtol=0, atol=4e-6 * np.abs(results[1]).max())


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("window", [30, 300])
def test_attention_in_a_window_has_the_same_bits_however_it_is_cut(
    window: int, kv_dtype: KvDtype, isa: str
) -> None:
    graph = attention_graph(
        head_dim=16, num_heads=4, num_kv_heads=2, causal=True, window=window, soft_cap=5.0
    )
    limits = Limits(max_tokens=700, max_outputs=700, max_sequences=4, num_blocks=100, max_context=800)
    parameters = random_parameters(graph)
    ids = np.random.default_rng(4).integers(0, VOCAB, size=700).tolist()

    def logits(threads: int, chunk: int) -> Float32Array:
        """Of the last 10 tokens, which go one by one."""
        stored = store_f32(parameters)
        native = compile_native(
            graph, stored, weights="f32", limits=limits, kv_dtype=kv_dtype, threads=threads, isa=isa
        )
        run = Run(native)
        for start in range(0, 690, chunk):
            run.step(ids[start : min(start + chunk, 690)])
        return np.concatenate([run.step([token]) for token in ids[690:]])

    whole = run_logits(
        compile_native(
            graph, store_f32(parameters), weights="f32", limits=limits, kv_dtype=kv_dtype, threads=1, isa=isa
        ),
        ids,
    )[690:]
    for threads, chunk in ((1, 97), (2, 350), (3, 33)):
        np.testing.assert_array_equal(logits(threads, chunk), whole)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_attention_never_reads_what_another_sequence_left_in_a_block(kv_dtype: KvDtype, isa: str) -> None:
    graph = attention_graph(head_dim=8, num_heads=2, num_kv_heads=1, causal=True)
    parameters = random_parameters(graph)
    parameters["v"][VOCAB - 1] = np.nan
    native = compile_native(
        graph, store_f32(parameters), weights="f32", limits=LIMITS, kv_dtype=kv_dtype, isa=isa
    )
    fresh = run_logits(native, [1, 2, 3])
    run_logits(native, [VOCAB - 1] * 32)
    np.testing.assert_array_equal(run_logits(native, [1, 2, 3]), fresh)


def test_output_rows_may_be_any_rows_in_any_order(isa: str) -> None:
    b = GraphBuilder()
    graph = b.finish(logits=b.gather_rows(b.embedding("token_ids", "x", size=VOCAB, width=5)))
    parameters = random_parameters(graph)
    native = compile_native(graph, store_f32(parameters), weights="f32", limits=LIMITS, isa=isa)
    batch = make_batch([(Run(native), [4, 5, 6])])
    object.__setattr__(batch, "output_rows", np.array([2, 0, 2], np.int32))
    np.testing.assert_array_equal(native.run(batch).outputs["logits"], parameters["x"][[6, 4, 6]])


@pytest.mark.parametrize("rank", [1, 15, 64, 65])
@pytest.mark.parametrize("width", [1, 17, 64, 257])
def test_adapters_of_rows_of_several_sequences_equal_torch(width: int, rank: int, isa: str) -> None:
    b = GraphBuilder()
    x = misaligned(b, "x", 33)
    narrow = [b.linear(x, f"{name}.weight", width=size) for name, size in (("a", 19), ("b", 3))]
    wide = b.linear(x, "c.weight", width=width)
    graph = merge_linears(
        b.finish(logits=b.gather_rows(wide), a=b.scale(narrow[0], 2.0), b=b.scale(narrow[1], 2.0))
    )
    assert count_linears(graph) == 1
    parameters = {
        name: np.random.default_rng(ord(name[0])).normal(size=(size, 33)).astype(np.float32)
        for name, size in (("a.weight", 19), ("b.weight", 3), ("c.weight", width))
    } | {"x": random_parameters(graph)["x"]}
    rng = np.random.default_rng(rank)
    limits = replace(LIMITS, num_adapter_slots=2, max_adapter_rank=65)
    adapters = [
        {
            f"{name}.weight": LowRankMatrices(
                rng.normal(size=(rank, 33)).astype(np.float32),
                rng.normal(size=(len(parameters[f"{name}.weight"]), rank)).astype(np.float32),
            )
            for name in names
        }
        for names in ("ac", "b")
    ]
    outputs = []
    for executable in (
        compile_native(graph, store_f32(parameters), weights="f32", limits=limits, kv_dtype="f32", isa=isa),
        compile_torch(graph, parameters, limits=limits),
    ):
        for slot, matrices in enumerate(adapters):
            executable.set_adapter(slot, matrices)
        texts = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]
        batch = make_batch([(Run(executable, place), ids) for place, ids in enumerate(texts)])
        batch = replace(batch, adapter_slots=np.array([1, NO_ADAPTER, 0, 1], np.int32))
        outputs.append({name: value.copy() for name, value in executable.run(batch).outputs.items()})
    for name, expected in outputs[1].items():
        atol = 4e-6 * np.abs(expected).max()
        np.testing.assert_allclose(outputs[0][name], expected, rtol=0, atol=atol, err_msg=name)


def count_linears(graph: Graph) -> int:
    return sum(node.op == "linear" for node in graph.nodes)
