from __future__ import annotations

import pytest

from fastserve.backends.native.weight_scheme import choose_schemes
from fastserve.config import DEFAULT_CONTEXT_LENGTH, EngineOptions, Speculation
from fastserve.engine.capacity import MAX_DERIVED_KV_BYTES, choose_context_length, plan_capacity
from fastserve.engine.footprint import BLOCK_SIZE, Footprint
from fastserve.errors import ContextLengthError, MemoryLimitError
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Graph
from fastserve.types import Limits

BLOCK_BYTES = 2 * 256 * BLOCK_SIZE * 2  # keys and values of one layer with a head of 256, f16


def make_graph(*, causal: bool = True) -> Graph:
    b = GraphBuilder()
    x = b.embedding("token_ids", "embed", size=10, width=256)
    return b.finish(out=b.attention(x, x, x, layer_index=0, head_dim=256, scale=1.0, causal=causal))


def plan(
    *,
    context_length: int = 100,
    available_bytes: int | None = None,
    causal: bool = True,
    max_batch_tokens: int | None = 64,
    max_sequences: int = 4,
    kv_memory: int | None = None,
    speculation: Speculation = "off",
) -> tuple[Limits, Footprint]:
    options = EngineOptions(
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
        kv_memory=kv_memory,
        speculation=speculation,
    )
    graph = make_graph(causal=causal)
    capacity = plan_capacity(
        graph,
        options,
        schemes=choose_schemes(graph, "f32", {}),
        context_length=context_length,
        available_bytes=available_bytes,
    )
    return capacity.limits, capacity.footprint


def test_the_context_is_the_models_own_up_to_the_default() -> None:
    assert choose_context_length(EngineOptions(), 512) == 512
    assert choose_context_length(EngineOptions(), 131072) == DEFAULT_CONTEXT_LENGTH
    assert choose_context_length(EngineOptions(context_length=131072), 131072) == 131072
    with pytest.raises(ContextLengthError, match="513; the model was made for 512"):
        choose_context_length(EngineOptions(context_length=513), 512)


@pytest.mark.parametrize(
    ("causal", "context_length", "expected"), [(True, 100, 512), (False, 100, 2048), (False, 4096, 4096)]
)
def test_a_step_takes_more_tokens_of_an_encoder_unless_told(
    causal: bool, context_length: int, expected: int
) -> None:
    limits, _ = plan(causal=causal, context_length=context_length, max_batch_tokens=None)
    assert limits.max_tokens == expected


def test_with_memory_to_spare_every_sequence_may_fill_its_context() -> None:
    limits, footprint = plan()
    assert limits.num_blocks * BLOCK_SIZE >= 4 * 100
    assert footprint.kv_bytes == limits.num_blocks * BLOCK_BYTES


def test_the_derived_pool_has_an_upper_limit() -> None:
    _, footprint = plan(context_length=8192, max_sequences=1024)
    assert MAX_DERIVED_KV_BYTES - BLOCK_BYTES < footprint.kv_bytes <= MAX_DERIVED_KV_BYTES


def test_the_derived_pool_leaves_half_of_the_memory_that_is_spare() -> None:
    _, alone = plan(context_length=8192, kv_memory=8192 * BLOCK_BYTES)
    fixed_bytes = alone.total_bytes - alone.kv_bytes
    _, footprint = plan(
        context_length=8192, max_sequences=64, available_bytes=fixed_bytes + 600 * BLOCK_BYTES
    )
    assert footprint.kv_bytes == 300 * BLOCK_BYTES


def test_the_pool_holds_at_least_one_context_however_little_memory_there_is() -> None:
    limits, _ = plan(available_bytes=0)
    assert limits.num_blocks == 4  # 100 tokens


def test_kv_memory_is_taken_as_it_is_but_for_a_part_of_a_block() -> None:
    limits, footprint = plan(kv_memory=7 * BLOCK_BYTES + 1)
    assert (limits.num_blocks, footprint.kv_bytes) == (7, 7 * BLOCK_BYTES)


def test_kv_memory_may_hold_less_than_a_context_but_not_less_than_a_block() -> None:
    limits, _ = plan(kv_memory=BLOCK_BYTES)
    assert (limits.num_blocks, limits.max_context) == (1, 100)
    with pytest.raises(
        MemoryLimitError, match="kv_memory holds 0 blocks of 32 tokens; the least is 1"
    ) as raised:
        plan(kv_memory=BLOCK_BYTES - 1)
    assert raised.value.hint == f"choose kv_memory={BLOCK_BYTES} or more"


def test_kv_memory_of_an_encoder_holds_a_whole_text_as_a_step_of_it_does() -> None:
    limits, _ = plan(causal=False, kv_memory=4 * BLOCK_BYTES)
    assert limits.num_blocks == 4
    with pytest.raises(MemoryLimitError, match="kv_memory holds 3 blocks of 32 tokens; the least is 4"):
        plan(causal=False, kv_memory=4 * BLOCK_BYTES - 1)


def test_a_step_of_an_encoder_takes_a_whole_text_and_its_pool_one_step() -> None:
    limits, _ = plan(causal=False, context_length=300)
    assert limits.max_tokens == 300
    assert 300 // BLOCK_SIZE < limits.num_blocks <= 300 // BLOCK_SIZE + 4


@pytest.mark.parametrize(
    ("max_sequences", "max_batch_tokens", "num_outputs"),
    [(1, 64, 9), (2, 64, 18), (16, 64, 32), (48, 64, 48), (4, 8, 8)],
)
def test_speculation_has_output_rows_for_the_drafts_of_a_few_sequences(
    max_sequences: int, max_batch_tokens: int, num_outputs: int
) -> None:
    limits, _ = plan(
        max_sequences=max_sequences, max_batch_tokens=max_batch_tokens, speculation="prompt-lookup"
    )
    assert limits.max_outputs == num_outputs
    limits, _ = plan(max_sequences=max_sequences, max_batch_tokens=max_batch_tokens)
    assert limits.max_outputs == max_sequences
