from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from fastserve import _native
from fastserve.backends.native import layout
from fastserve.backends.native.chains import Chain, find_chains
from fastserve.backends.native.weight_scheme import choose_schemes
from fastserve.config import EngineOptions, KvDtype
from fastserve.engine.footprint import Footprint, block_bytes, weights_bytes
from fastserve.engine.load import load_model
from fastserve.errors import MemoryLimitError
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Graph


@pytest.fixture
def graph() -> Graph:
    """An embedding of 10 x 4 that is the head too, a norm, and two attentions with one key head of 4."""
    b = GraphBuilder()
    x = b.embedding("token_ids", "embed", size=10, width=4)
    x = b.rms_norm(x, "norm", eps=1e-5)
    for layer_index in range(2):
        x = b.attention(x, x, x, layer_index=layer_index, head_dim=4, scale=1.0, causal=True)
    return b.finish(logits=b.linear(x, "embed", width=10))


@pytest.mark.parametrize(
    ("weights", "matrix_bytes"), [("f32", 64 * 16), ("bf16", 64 * 8), ("int8", 64 * (8 + 2))]
)
def test_a_shared_matrix_counts_once_padded_to_a_panel_and_vectors_as_f32(
    graph, weights, matrix_bytes
) -> None:
    assert weights_bytes(graph, choose_schemes(graph, weights, {})) == matrix_bytes + 4 * 4


@pytest.mark.parametrize("head_dim", [4, 16, 40])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("kv_dtype", get_args(KvDtype))
def test_a_block_is_reckoned_as_large_as_the_pool_makes_it(
    kv_dtype: KvDtype, is_causal: bool, head_dim: int
) -> None:
    b = GraphBuilder()
    x = b.embedding("token_ids", "embed", size=10, width=2 * head_dim)
    for layer in range(3):
        x = b.attention(x, x, x, layer_index=layer, head_dim=head_dim, scale=1.0, causal=is_causal)
    graph = b.finish(hidden=x)
    num_layers = 3 if is_causal else 1
    pool = _native.KvPool(num_layers, 5, num_kv_heads=2, head_dim=head_dim, format=kv_dtype)
    assert 5 * block_bytes(graph, kv_dtype) == pool.num_bytes


def test_a_model_is_laid_out_once_for_its_footprint_and_its_plan(
    stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Graph] = []

    def find_and_count(graph: Graph) -> list[Chain]:
        seen.append(graph)
        return find_chains(graph)

    monkeypatch.setattr(layout, "find_chains", find_and_count)
    model = load_model(stories, EngineOptions(threads=2))
    assert len(seen) == 1
    assert model.footprint.activation_bytes > model.executable.limits.max_tokens * model.config.hidden_size


def test_too_little_memory_is_told_with_both_numbers() -> None:
    mib = 2**20
    footprint = Footprint(weights_bytes=100 * mib, kv_bytes=mib, activation_bytes=mib, runtime_bytes=mib)
    footprint.check(103 * mib)
    with pytest.raises(MemoryLimitError, match=r"needs 103 MiB .* 102 MiB are available"):
        footprint.check(102 * mib)


@pytest.mark.parametrize(
    ("part", "remedy"),
    [
        ("weights_bytes", "weights='int8'"),
        ("kv_bytes", "kv_memory"),
        ("activation_bytes", "max_batch_tokens"),
    ],
)
def test_the_remedy_is_to_make_the_largest_part_smaller(part: str, remedy: str) -> None:
    sizes = {"weights_bytes": 1, "kv_bytes": 1, "activation_bytes": 1} | {part: 2**40}
    hint = Footprint(**sizes).to_error(available_bytes=2**30).hint
    assert hint is not None
    assert remedy in hint
