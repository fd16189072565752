"""Strips of rows change where values lie and who computes them, never a bit of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from fastserve import _native
from fastserve.backends.native import chains, layout
from fastserve.backends.native import executable as native
from fastserve.backends.native.chains import find_chains
from fastserve.config import WeightFormat
from fastserve.engine.encoder import Encoder
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Attention, Graph
from fastserve.graph.passes import optimize
from fastserve.types import Float32Array, Limits
from parity import run_logits, store_f32
from tiny_models import BERT_CONFIG, LLAMA_CONFIG, random_parameters, tiny_graph

LIMITS = Limits(max_tokens=600, max_outputs=600, max_sequences=64, num_blocks=128, max_context=200)
BERT = {**BERT_CONFIG, "max_position_embeddings": 200}
LLAMA = {**LLAMA_CONFIG, "max_position_embeddings": 600}

# Strips of whole sequences; sequences too long or too uneven for that; too few rows for strips at all.
BATCHES = {
    "equal": [33] * 8,
    "ragged": list(range(5, 70, 5)),
    "long": [128, 128, 65, 1],
    "uneven": [120, 3],
    "too long": [129, 64, 150],
    "few": [3, 1, 7],
    "one": [97],
}


def texts_of(lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, vocab_size, size=length).tolist() for length in lengths]


def embed(
    lengths: Sequence[int], *, weights: WeightFormat, threads: int, isa: str | None = None
) -> Float32Array:
    graph = tiny_graph(BERT)
    executable = native.compile_native(
        optimize(graph),
        store_f32(random_parameters(graph)),
        weights=weights,
        limits=LIMITS,
        threads=threads,
        isa=isa,
    )
    return Encoder(executable).embed(texts_of(lengths, BERT["vocab_size"]))


@pytest.mark.parametrize("isa", _native.runnable_isas())
@pytest.mark.parametrize("weights", ["f32", "int8", "int4"])
@pytest.mark.parametrize("batch", BATCHES)
def test_an_encoder_in_strips_gives_the_same_bits(
    batch: str, weights: WeightFormat, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = BATCHES[batch]
    in_strips = [embed(lengths, weights=weights, threads=threads, isa=isa) for threads in (1, 2, 3)]
    monkeypatch.setattr(layout, "find_chains", lambda graph: [])
    expected = embed(lengths, weights=weights, threads=1, isa=isa)
    assert np.isfinite(expected).all()
    for embeddings in in_strips:
        np.testing.assert_array_equal(embeddings, expected)


@pytest.mark.parametrize("weights", ["f32", "int8"])
@pytest.mark.parametrize("num_tokens", [1, 63, 64, 200, 577])
def test_a_decoder_in_strips_gives_the_same_bits(
    num_tokens: int, weights: WeightFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = tiny_graph(LLAMA)
    limits = Limits(max_tokens=600, max_outputs=600, max_sequences=1, num_blocks=128, max_context=600)
    parameters = store_f32(random_parameters(graph))
    (prompt,) = texts_of([num_tokens], LLAMA["vocab_size"])

    def logits(threads: int) -> Float32Array:
        executable = native.compile_native(
            optimize(graph), parameters, weights=weights, limits=limits, threads=threads
        )
        return run_logits(executable, prompt)

    in_strips = [logits(threads) for threads in (1, 2)]
    monkeypatch.setattr(layout, "find_chains", lambda graph: [])
    for actual in in_strips:
        np.testing.assert_array_equal(actual, logits(1))


def ops_of(graph: Graph, nodes: range) -> list[str]:
    return [graph.nodes[position].op for position in nodes]


def test_an_encoder_is_one_chain_of_sequences_up_to_its_pooling_with_chains_of_rows_between_attentions() -> (
    None
):
    graph = optimize(tiny_graph(BERT))
    whole, *rows = find_chains(graph)
    assert whole.whole_sequences
    assert ops_of(graph, whole.nodes) == ops_of(graph, range(whole.nodes.stop))
    assert graph.nodes[whole.nodes.stop].op == "pool"
    num_layers = sum(isinstance(node, Attention) for node in graph.nodes)
    assert len(rows) == num_layers + 1
    for chain in rows:
        assert not chain.whole_sequences
        assert "attention" not in ops_of(graph, chain.nodes)
        assert chain.values < whole.values
        assert chain.strip is whole.strip


def test_a_decoder_has_chains_of_rows_alone_whose_attention_reads_what_lies_outside_of_them() -> None:
    graph = optimize(tiny_graph(LLAMA))
    found = find_chains(graph)
    assert found
    assert not any(chain.whole_sequences for chain in found)
    read = {value for node in graph.nodes if isinstance(node, Attention) for value in node.inputs()}
    assert all(read.isdisjoint(chain.values) for chain in found)


def test_rows_too_wide_for_the_cache_make_no_chain() -> None:
    b = GraphBuilder()
    x = b.activation(b.embedding("token_ids", "embed", size=3, width=64), "relu")
    wide = b.linear(x, "up", width=chains.STRIP_BYTES // 4 // chains.LEAST_STRIP_ROWS)
    graph = b.finish(y=b.linear(b.activation(wide, "relu"), "down", width=64))
    assert find_chains(graph) == []


def make_plan(*, needs_whole_sequences: bool) -> _native.Plan:
    return _native.Plan(
        native.make_runtime(1),
        1 << 16,
        max_tokens=8,
        max_outputs=1,
        max_sequences=1,
        num_blocks=1,
        max_context=8,
        vocab_size=8,
        num_token_types=0,
        needs_whole_sequences=needs_whole_sequences,
    )


def test_a_plan_refuses_chains_that_it_cannot_run() -> None:
    plan = make_plan(needs_whole_sequences=False)
    with pytest.raises(ValueError, match="no chain was begun"):
        plan.end_chain()
    with pytest.raises(ValueError, match="come in parts"):
        plan.start_sequence_chain(8, 64)
    with pytest.raises(ValueError, match="rows of a strip"):
        plan.start_chain(6, 64)
    plan.start_chain(8, 8 * 16)
    with pytest.raises(ValueError, match="within a chain"):
        plan.start_chain(8, 64)
    inside = _native.Matrix(0, 4, 4, _native.Rows.TOKENS, strip_offset_bytes=0)
    beyond = _native.Matrix(0, 4, 4, _native.Rows.TOKENS, strip_offset_bytes=64)
    of_sequences = _native.Matrix(
        0, 4, 4, _native.Rows.TOKENS, strip_offset_bytes=0, needs_whole_sequences=True
    )
    plan.add(inside, inside, inside)
    with pytest.raises(ValueError, match="outside its strip"):
        plan.add(inside, beyond, inside)
    with pytest.raises(ValueError, match="outside of a chain"):
        plan.add(inside, inside, of_sequences)
    out = _native.Matrix(0, 4, 4, _native.Rows.SEQUENCES)
    arena_only = _native.Matrix(0, 4, 4, _native.Rows.TOKENS)
    with pytest.raises(ValueError, match="pool cannot be part"):
        plan.pool(_native.PoolKind.mean, arena_only, out)
    plan.end_chain()
    with pytest.raises(ValueError, match="outside of a chain"):
        plan.add(inside, inside, inside)
