from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fastserve.backends.bounds import BatchBounds
from fastserve.backends.native import executable as native
from fastserve.backends.native.executable import NativeExecutable
from fastserve.errors import OptionError
from fastserve.types import Batch, Limits
from parity import store_f32
from tiny_models import BERT_CONFIG, LLAMA_CONFIG, random_parameters, tiny_graph

LIMITS = Limits(max_tokens=6, max_outputs=3, max_sequences=2, num_blocks=5, max_context=12)
BOUNDS = BatchBounds.from_graph(tiny_graph(LLAMA_CONFIG), LIMITS, block_size=4)


def array(*numbers: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(numbers, np.int32)


# Two tokens after six, in blocks 4 and 0; then a sequence's first three tokens, in block 2. 99 is padding.
BATCH = Batch(
    token_ids=array(1, 2, 3, 4, 96),
    positions=array(6, 7, 0, 1, 2),
    sequence_starts=array(0, 2, 5),
    context_lengths=array(8, 3),
    block_tables=np.array([[4, 0], [2, 99]], np.int32),
    output_rows=array(1, 4),
)


def test_a_batch_within_the_bounds_passes() -> None:
    BOUNDS.check(BATCH)


def test_no_output_rows_are_as_good_as_some() -> None:
    BOUNDS.check(replace(BATCH, output_rows=array()))


MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"token_ids": array(1, 2, 3, 4, 97)}, r"token_ids holds 97, outside 0\.\.96"),
    ({"token_ids": array(1, -2, 3, 4, 5)}, "token_ids holds -2"),
    ({"output_rows": array(5)}, r"output_rows holds 5, outside 0\.\.4"),
    ({"output_rows": array(0, 1, 2, 3)}, "4 outputs, the limit is max_outputs=3"),
    ({"positions": array(5, 6, 0, 1, 2)}, "positions must be the last"),
    ({"positions": array(6, 7, 0, 1)}, "positions has 4 entries, not 5"),
    ({"context_lengths": array(8, 4)}, "positions must be the last"),
    ({"sequence_starts": array(0, 2, 4)}, "must rise from 0 to 5"),
    ({"sequence_starts": array(1, 2, 5)}, "must rise from 0 to 5"),
    ({"sequence_starts": array(0, 5)}, "sequence_starts has 2 entries, not 3"),
    ({"block_tables": np.array([[4], [2]], np.int32)}, "block_tables has 1 columns.* needs 2"),
    ({"block_tables": np.array([[4, 5], [2, 0]], np.int32)}, r"block_tables holds 5, outside 0\.\.4"),
    ({"block_tables": np.array([[4, 0]], np.int32)}, "block_tables has 1 entries, not 2"),
    ({"token_types": array(0, 0, 1, 0, 0)}, r"token_types holds 1, outside 0\.\.0"),
]


@pytest.mark.parametrize(("changes", "message"), MISFITS)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        BOUNDS.check(replace(BATCH, **changes))


def one_sequence(length: int, first: int = 0) -> Batch:
    return Batch(
        token_ids=np.zeros(length, np.int32),
        positions=np.arange(first, first + length, dtype=np.int32),
        sequence_starts=array(0, length),
        context_lengths=array(first + length),
        block_tables=array(0, 1, 2, 3).reshape(1, 4),
        output_rows=array(0),
    )


def test_tokens_beyond_the_limit_are_refused_with_both_numbers_and_the_remedy() -> None:
    BOUNDS.check(one_sequence(6))
    with pytest.raises(OptionError, match="7 tokens, the limit is max_tokens=6") as caught:
        BOUNDS.check(one_sequence(7))
    assert caught.value.hint == "split the batch, or compile with max_tokens=7"


def test_a_position_beyond_the_context_is_refused() -> None:
    BOUNDS.check(one_sequence(1, first=11))
    with pytest.raises(OptionError, match=r"positions holds 12, outside 0\.\.11"):
        BOUNDS.check(one_sequence(1, first=12))


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(OptionError, match="no tokens"):
        BOUNDS.check(replace(one_sequence(1), token_ids=array()))


def test_an_encoder_is_bounded_by_its_position_table_and_needs_whole_sequences() -> None:
    graph = tiny_graph({**BERT_CONFIG, "max_position_embeddings": 5})
    bounds = BatchBounds.from_graph(graph, LIMITS, block_size=4)
    bounds.check(one_sequence(5))
    with pytest.raises(OptionError, match=r"positions holds 5, outside 0\.\.4"):
        bounds.check(one_sequence(6))
    with pytest.raises(OptionError, match="3 tokens outside the batch"):
        bounds.check(one_sequence(2, first=3))


def compile_native(limits: Limits) -> NativeExecutable:
    graph = tiny_graph(LLAMA_CONFIG)
    return native.compile_native(graph, store_f32(random_parameters(graph)), limits=limits)


@pytest.mark.parametrize(
    "changes",
    [
        *(changes for changes, _ in MISFITS),
        {"sequence_starts": array(0, 5, 5)},
        {"sequence_starts": array(0, 9, 5)},
        {"block_tables": np.array([[4, -1], [2, 0]], np.int32)},
    ],
)
def test_the_native_backend_refuses_the_same_by_itself(changes: dict[str, Any]) -> None:
    """Its blocks are of 32 tokens, so the limits are those of longer sequences."""
    executable = compile_native(replace(LIMITS, max_context=64))
    batch = replace(
        BATCH,
        context_lengths=array(38, 3),
        positions=array(36, 37, 0, 1, 2),
    )
    executable.run(batch)
    with pytest.raises(OptionError):
        executable.run(replace(batch, **changes))


def test_the_native_backend_refuses_more_than_its_limits() -> None:
    executable = compile_native(replace(LIMITS, max_context=64))
    executable.run(one_sequence(6))
    with pytest.raises(OptionError, match="tokens in the batch is 7; the limits are 1 and 6"):
        executable.run(one_sequence(7))
