"""What an encoder stores and a decoder reads, native against torch: each instruction set, odd sizes."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from fastserve import _native
from fastserve.config import KvDtype
from fastserve.graph.builder import GraphBuilder
from fastserve.types import Float32Array, SourceExecutable
from native_graphs import VOCAB, misaligned, random_parameters
from source_parity import Graphs, Target, compile_graphs, encode_sources, run_target, step_targets

ISAS = _native.runnable_isas()
KV_DTYPES = get_args(KvDtype)
SOURCE: list[int] = np.random.default_rng(2).integers(0, VOCAB, size=600).tolist()  # beyond splits of 256

pytestmark = pytest.mark.parametrize("isa", ISAS)


def make_graphs(head_dim: int, num_heads: int, *, has_own_attention: bool = False) -> Graphs:
    """A source and a target of one layer, in layer 1 of the pool, where the target's own attention is too."""
    encoder = GraphBuilder()
    width = head_dim * num_heads
    k, v = misaligned(encoder, "k", width), misaligned(encoder, "v", width, offset=1)
    encoder.store_source(k, v, layer_index=1, head_dim=head_dim)
    b = GraphBuilder()
    q = misaligned(b, "q", width)
    if has_own_attention:
        own_k, own_v = misaligned(b, "own_k", width), misaligned(b, "own_v", width)
        q = b.attention(q, own_k, own_v, layer_index=1, head_dim=head_dim, scale=0.3, causal=True)
    y = b.cross_attention(q, layer_index=1, head_dim=head_dim, scale=head_dim**-0.5)
    source, target = encoder.finish(), b.finish(logits=b.gather_rows(y))
    return Graphs(source, target, random_parameters(target.beside(source)))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("num_heads", [1, 5])
@pytest.mark.parametrize("head_dim", [1, 15, 17, 64, 256])
def test_cross_attention_equals_torch(head_dim: int, num_heads: int, kv_dtype: KvDtype, isa: str) -> None:
    graphs = make_graphs(head_dim, num_heads)
    target = [7 * i % VOCAB for i in range(57)]  # more rows than a task has
    torch = compile_graphs("torch", graphs, kv_dtype=kv_dtype, max_context=320)
    native = compile_graphs("native", graphs, kv_dtype=kv_dtype, max_context=320, isa=isa)
    for length in (1, 15, 257):
        expected = run_target(torch, SOURCE[:length], target, chunk=50)
        actual = run_target(native, SOURCE[:length], target, chunk=50)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=4e-6 * np.abs(expected).max())


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("has_own_attention", [False, True])
def test_cross_attention_has_the_same_bits_however_it_is_cut(
    has_own_attention: bool, kv_dtype: KvDtype, isa: str
) -> None:
    """Targets in any chunks or token by token; splits of the source in one task, or each in its own and
    merged."""
    graphs = make_graphs(24, 3, has_own_attention=has_own_attention)
    target = [7 * i % VOCAB for i in range(60)]

    def logits(threads: int, chunk: int) -> Float32Array:
        executable = compile_graphs(
            "native", graphs, kv_dtype=kv_dtype, max_context=640, threads=threads, isa=isa
        )
        return run_target(executable, SOURCE, target, chunk=chunk)

    whole = logits(1, 60)
    for threads, chunk in ((1, 1), (2, 1), (3, 17), (8, 1)):
        np.testing.assert_array_equal(logits(threads, chunk), whole)


def test_targets_read_their_own_sources_among_others(isa: str) -> None:
    graphs = make_graphs(16, 2, has_own_attention=True)

    def executable() -> SourceExecutable:
        return compile_graphs("native", graphs, max_context=640, threads=2, isa=isa)

    shared = executable()
    lengths = (600, 1, 300, 40)
    targets = [Target(shared, SOURCE[:length], place) for place, length in enumerate(lengths)]
    encode_sources(targets[:2])
    encode_sources(targets[2:])
    together = step_targets([(target, [place, 3]) for place, target in enumerate(targets)])
    for place, target in enumerate(targets):
        alone = run_target(executable(), target.source_ids, [place, 3])
        np.testing.assert_array_equal(together[place], alone)
