"""A block that was read out, clobbered and written back elsewhere holds the same keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from fastserve.config import KvDtype
from fastserve.types import Executable, Float32Array, UInt8Array
from parity import Run, compile_graph, make_batch
from tiny_models import LLAMA_CONFIG, random_parameters, tiny_graph

PROMPT = [(7 * i + i * i) % 97 for i in range(70)]  # the third block is partly filled
NUM_TOKENS = 30  # a fourth block is begun
TABLE = [3, 60, 11, 0]
OTHER_TABLE = [20, 3, 63, 60]  # shares blocks with the first, at other places


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    pytest.importorskip({"native": "fastserve._native", "torch": "torch"}[request.param])
    return request.param


@pytest.fixture(params=get_args(KvDtype))
def executable(request: pytest.FixtureRequest, backend: str) -> Executable:
    graph = tiny_graph(LLAMA_CONFIG)
    return compile_graph(backend, graph, random_parameters(graph), kv_dtype=request.param)


def step(executable: Executable, run: Run, new_ids: Sequence[int], table: Sequence[int]) -> Float32Array:
    """Logits [new tokens, vocab] of a sequence whose blocks are those of `table`."""
    batch = replace(make_batch([(run, new_ids)]), block_tables=np.array([table], np.int32))
    run.token_ids += new_ids
    return executable.run(batch).outputs["logits"].copy()


def decode(executable: Executable, run: Run, first_id: int, table: Sequence[int]) -> Float32Array:
    """Logits [NUM_TOKENS, vocab] of greedy tokens, the first of which is given."""
    rows, token_id = [], first_id
    for _ in range(NUM_TOKENS):
        rows.append(step(executable, run, [token_id], table)[-1])
        token_id = int(rows[-1].argmax())
    return np.array(rows)


def run_plainly(executable: Executable) -> Float32Array:
    run = Run(executable)
    first_id = int(step(executable, run, PROMPT, TABLE)[-1].argmax())
    return decode(executable, run, first_id, TABLE)


def read_blocks(executable: Executable, table: Sequence[int]) -> list[UInt8Array]:
    blocks = [np.empty(executable.block_bytes, np.uint8) for _ in table]
    for block, out in zip(table, blocks, strict=True):
        executable.read_block(block, out)
    return blocks


def clobber(executable: Executable, blocks: Sequence[int]) -> None:
    rng = np.random.default_rng(1)
    for block in blocks:
        executable.write_block(block, rng.integers(0, 256, executable.block_bytes, np.uint8))


def test_logits_are_the_same_bits_after_blocks_went_out_and_came_in_elsewhere(
    executable: Executable,
) -> None:
    expected = run_plainly(executable)
    run = Run(executable)
    first_id = int(step(executable, run, PROMPT, TABLE)[-1].argmax())
    saved = read_blocks(executable, TABLE[:3])
    clobber(executable, TABLE)
    for block, data in zip(OTHER_TABLE, saved, strict=False):
        data.flags.writeable = False  # it is only read
        executable.write_block(block, data)
    actual = decode(executable, run, first_id, OTHER_TABLE)
    assert actual.tobytes() == expected.tobytes()
    assert len({row.tobytes() for row in actual}) == NUM_TOKENS


def test_logits_are_the_same_bits_on_copies_of_blocks(executable: Executable) -> None:
    expected = run_plainly(executable)
    run, copies = Run(executable), [40, 39, 38, 37]
    first_id = int(step(executable, run, PROMPT, TABLE)[-1].argmax())
    for source, target in zip(TABLE[:3], copies, strict=False):
        executable.copy_block(source, target)
    executable.copy_block(copies[0], copies[0])
    clobber(executable, TABLE)
    assert decode(executable, run, first_id, copies).tobytes() == expected.tobytes()


def test_writing_a_block_changes_its_own_bytes_and_no_others(executable: Executable) -> None:
    all_blocks = range(executable.limits.num_blocks)
    clobber(executable, all_blocks)
    before = read_blocks(executable, all_blocks)
    data = np.roll(before[5], 1)
    executable.write_block(5, data)
    after = read_blocks(executable, all_blocks)
    assert after[5].tobytes() == data.tobytes()
    assert [b.tobytes() for i, b in enumerate(after) if i != 5] == [
        b.tobytes() for i, b in enumerate(before) if i != 5
    ]


def test_what_is_no_block_is_refused(executable: Executable) -> None:
    data = np.zeros(executable.block_bytes, np.uint8)
    for block in (-1, executable.limits.num_blocks):
        with pytest.raises(ValueError, match=f"is {block}; the limits are 0 and 63"):
            executable.read_block(block, data)
        with pytest.raises(ValueError, match=f"is {block}; the limits are 0 and 63"):
            executable.write_block(block, data)
        with pytest.raises(ValueError, match=f"is {block}; the limits are 0 and 63"):
            executable.copy_block(0, block)
    for size in (0, executable.block_bytes - 1, executable.block_bytes + 1):
        with pytest.raises(ValueError, match=f"has {size} bytes; a block has {executable.block_bytes}"):
            executable.read_block(0, np.zeros(size, np.uint8))
        with pytest.raises(ValueError, match=f"has {size} bytes; a block has {executable.block_bytes}"):
            executable.write_block(0, np.zeros(size, np.uint8))


def test_bytes_are_read_into_the_array_itself_or_not_at_all(executable: Executable) -> None:
    clobber(executable, [0])
    expected = read_blocks(executable, [0])[0]
    strided = np.zeros(2 * executable.block_bytes, np.uint8)[::2]
    try:
        executable.read_block(0, strided)
    except TypeError:
        assert not strided.any()
    else:
        assert strided.tobytes() == expected.tobytes()
