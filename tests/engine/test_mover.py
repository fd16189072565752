from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_executable import FakeExecutable

from fastserve.config import EngineOptions
from fastserve.engine import mover as mover_module
from fastserve.engine.mover import Move, MoveResult, ThreadMover, make_mover
from fastserve.engine.tier import HostTier, SlowTier, SpillFile
from fastserve.errors import MemoryLimitError, OptionError
from fastserve.types import Executable, Float32Array, Limits, UInt8Array

NUM_BLOCKS, NUM_SLOW_BLOCKS = 12, 9
TIMEOUT_SECONDS = 30.0

MakeMover = Callable[..., ThreadMover]


class FaultyTier:
    """Host memory whose transfers, from when it is told, fail or wait."""

    def __init__(self, block_bytes: int) -> None:
        self.num_blocks = NUM_SLOW_BLOCKS
        self.num_closed = 0
        self.error: Exception | None = None
        self.error_blocks = range(NUM_SLOW_BLOCKS)
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.is_reached = threading.Event()
        self._tier = HostTier(num_blocks=NUM_SLOW_BLOCKS, block_bytes=block_bytes)

    def write(self, block: int, data: UInt8Array) -> None:
        self._meet(block)
        self._tier.write(block, data)

    def read(self, block: int, out: UInt8Array) -> None:
        self._meet(block)
        self._tier.read(block, out)

    def close(self) -> None:
        self.num_closed += 1

    def _meet(self, block: int) -> None:
        self.is_reached.set()
        assert self.may_go_on.wait(TIMEOUT_SECONDS)
        if self.error is not None and block in self.error_blocks:
            raise self.error


@pytest.fixture
def executable() -> FakeExecutable:
    executable = FakeExecutable(Limits(num_blocks=NUM_BLOCKS))
    for block in range(NUM_BLOCKS):
        executable.write_block(block, content(executable, block))
    return executable


@pytest.fixture
def tier(executable: FakeExecutable) -> FaultyTier:
    return FaultyTier(executable.block_bytes)


@pytest.fixture
def mover(executable: FakeExecutable, tier: FaultyTier) -> Iterator[ThreadMover]:
    mover = ThreadMover(executable, tier)
    tier.is_reached.clear()
    yield mover
    tier.may_go_on.set()
    mover.close()


def content(executable: Executable, seed: int) -> UInt8Array:
    return np.random.default_rng(seed).integers(0, 256, executable.block_bytes, np.uint8)


def read(executable: Executable, block: int) -> UInt8Array:
    out = np.empty(executable.block_bytes, np.uint8)
    executable.read_block(block, out)
    return out


def results_of(mover: ThreadMover, count: int) -> list[MoveResult]:
    results: list[MoveResult] = []
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while len(results) < count:
        assert time.monotonic() < deadline, f"{len(results)} of {count} moves have finished"
        mover.wait(TIMEOUT_SECONDS)
        results += mover.poll()
    assert len(results) == count
    return results


def finish(mover: ThreadMover, *moves: Move) -> list[MoveResult]:
    for move in moves:
        mover.submit(move)
    results = results_of(mover, len(moves))
    assert [result.move for result in results] == list(moves)
    return results


def test_blocks_go_out_and_come_back_to_other_places(mover: ThreadMover, executable: FakeExecutable) -> None:
    results = finish(
        mover,
        Move(7, "out", ((0, 3), (1, 8), (2, 0))),
        Move(7, "in", ((9, 8), (0, 3), (5, 0))),
    )
    assert [result.error for result in results] == [None, None]
    assert all(result.seconds > 0 for result in results)
    for block, was in {9: 1, 0: 0, 5: 2, 1: 1, 2: 2, 3: 3}.items():
        assert read(executable, block).tobytes() == content(executable, was).tobytes()


def test_moves_finish_in_the_order_in_which_they_were_submitted(mover: ThreadMover) -> None:
    finish(mover, *(Move(i, "out", ((i % NUM_BLOCKS, i % NUM_SLOW_BLOCKS),)) for i in range(200)))


def test_a_move_of_no_blocks_finishes_too(mover: ThreadMover) -> None:
    assert finish(mover, Move(1, "in", ()))[0].error is None


def test_neither_submit_nor_poll_waits_for_the_disk(mover: ThreadMover, tier: FaultyTier) -> None:
    tier.may_go_on.clear()
    for i in range(100):
        mover.submit(Move(i, "out", ((0, 0),)))
    assert mover.poll() == []
    tier.may_go_on.set()
    assert [result.move.sequence_id for result in results_of(mover, 100)] == list(range(100))


def test_wait_ends_with_the_time_with_a_result_or_where_there_is_nothing_to_wait_for(
    mover: ThreadMover, tier: FaultyTier
) -> None:
    mover.wait(TIMEOUT_SECONDS)
    tier.may_go_on.clear()
    mover.submit(Move(0, "out", ((0, 0),)))
    begin = time.monotonic()
    mover.wait(0.02)
    assert 0.02 <= time.monotonic() - begin < TIMEOUT_SECONDS
    assert mover.poll() == []
    tier.may_go_on.set()
    mover.wait(TIMEOUT_SECONDS)
    mover.wait(TIMEOUT_SECONDS)  # what has not been polled is not waited for
    assert len(mover.poll()) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("direction", ["out", "in"])
def test_an_error_of_the_disk_fails_its_move_and_no_other(
    mover: ThreadMover, executable: FakeExecutable, tier: FaultyTier, number: int, direction: str
) -> None:
    finish(mover, Move(1, "out", ((4, 4), (5, 5))))
    tier.error, tier.error_blocks = OSError(number, os.strerror(number)), range(2, 3)
    failed, after = finish(
        mover, Move(1, direction, ((0, 1), (1, 2), (2, 3))), Move(2, "in", ((6, 4), (7, 5)))
    )
    assert failed.error == f"block 1 could not be moved {direction}: {os.strerror(number)}"
    assert after.error is None
    assert read(executable, 6).tobytes() == content(executable, 4).tobytes()
    assert read(executable, 1).tobytes() == content(executable, 1).tobytes()
    tier.error = None
    assert finish(mover, Move(1, "out", ((1, 2),)))[0].error is None


def test_a_defect_fails_its_move_and_not_the_thread(
    mover: ThreadMover, tier: FaultyTier, caplog: pytest.LogCaptureFixture
) -> None:
    tier.error = ZeroDivisionError("oh")
    assert finish(mover, Move(1, "out", ((0, 0),)))[0].error == (
        "block 0 could not be moved out: ZeroDivisionError: oh"
    )
    assert "Traceback" in caplog.text
    tier.error = None
    assert finish(mover, Move(1, "out", ((0, 0),)))[0].error is None


def test_a_tier_that_does_not_work_is_refused_at_the_start(
    executable: FakeExecutable, tier: FaultyTier
) -> None:
    tier.error = OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(OptionError, match="kv_spill does not work: Input/output error"):
        ThreadMover(executable, tier)
    assert tier.num_closed == 1


def test_measuring_the_tier_leaves_the_pool_as_it_is(mover: ThreadMover, executable: FakeExecutable) -> None:
    for block in range(NUM_BLOCKS):
        assert read(executable, block).tobytes() == content(executable, block).tobytes()


def test_seconds_per_block_are_known_from_the_beginning_and_follow_what_moves(
    mover: ThreadMover, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 0 < mover.seconds_per_block() < 1
    seen = [mover.seconds_per_block()]
    clock = iter(range(0, 10_000, 6))  # six seconds a move of two blocks
    monkeypatch.setattr(mover_module.time, "perf_counter", lambda: next(clock))
    for _ in range(60):
        finish(mover, Move(0, "out", ((0, 0), (1, 1))))
        seen.append(mover.seconds_per_block())
    assert seen == sorted(seen)
    assert seen[1] == pytest.approx(3 / 8, rel=0.01)
    assert seen[-1] == pytest.approx(3, rel=0.01)


def test_failed_moves_do_not_count_in_seconds_per_block(mover: ThreadMover, tier: FaultyTier) -> None:
    before = mover.seconds_per_block()
    tier.error = OSError(errno.EIO, os.strerror(errno.EIO))
    finish(mover, Move(0, "out", ((0, 0), (1, 1))))
    assert mover.seconds_per_block() == before


def test_closing_ends_moves_between_blocks_and_tells_what_was_not_moved(
    mover: ThreadMover, executable: FakeExecutable, tier: FaultyTier
) -> None:
    tier.may_go_on.clear()
    moves = [Move(0, "out", ((0, 0), (1, 1))), Move(1, "out", ((2, 2),)), Move(2, "in", ((3, 3),))]
    for move in moves:
        mover.submit(move)
    assert tier.is_reached.wait(TIMEOUT_SECONDS)
    closing = threading.Thread(target=mover.close)
    closing.start()
    while not mover._is_closing:
        time.sleep(0.001)
    tier.may_go_on.set()
    closing.join(TIMEOUT_SECONDS)
    assert not closing.is_alive()
    assert not mover._thread.is_alive()
    assert tier.num_closed == 1
    assert [(result.move, result.error) for result in mover.poll()] == [
        (move, "the mover was closed") for move in moves
    ]
    for block in range(NUM_BLOCKS):
        assert read(executable, block).tobytes() == content(executable, block).tobytes()
    mover.close()
    assert tier.num_closed == 1


def test_closing_does_not_wait_for_a_disk_that_hangs(
    mover: ThreadMover, tier: FaultyTier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mover_module, "_CLOSE_SECONDS", 0.02)
    tier.may_go_on.clear()
    mover.submit(Move(0, "out", ((0, 0),)))
    assert tier.is_reached.wait(TIMEOUT_SECONDS)
    mover.close()
    assert "has not answered" in caplog.text
    assert tier.num_closed == 0  # the thread still uses it
    tier.may_go_on.set()
    mover._thread.join(TIMEOUT_SECONDS)
    assert tier.num_closed == 1


def test_nothing_is_taken_after_closing(mover: ThreadMover) -> None:
    mover.close()
    with pytest.raises(AssertionError, match="closed"):
        mover.submit(Move(0, "out", ((0, 0),)))
    assert mover.poll() == []


@pytest.mark.parametrize("closes_early", [False, True])
def test_thousands_of_random_moves_lose_no_byte(tmp_path: Path, closes_early: bool) -> None:
    """Blocks wander between pool and file; each keeps its content; free places are clobbered."""
    executable = FakeExecutable(Limits(num_blocks=NUM_BLOCKS))
    mover = ThreadMover(
        executable, SpillFile(num_blocks=NUM_SLOW_BLOCKS, block_bytes=executable.block_bytes, folder=tmp_path)
    )
    rng = np.random.default_rng(11)
    # Contents by number; a place that is part of a move is in neither table.
    in_pool = {block: block for block in range(NUM_BLOCKS // 2)}
    in_file: dict[int, int] = {}
    free_blocks, free_slow_blocks = set(range(len(in_pool), NUM_BLOCKS)), set(range(NUM_SLOW_BLOCKS))
    moving: dict[int, tuple[Move, list[int]]] = {}
    for block, number in in_pool.items():
        executable.write_block(block, content(executable, number))

    def submit(move_id: int) -> None:
        is_out = bool(rng.integers(2))
        sources, targets = (in_pool, free_slow_blocks) if is_out else (in_file, free_blocks)
        count = min(int(rng.integers(1, 4)), len(sources), len(targets))
        places = [int(place) for place in rng.permutation(sorted(sources))[:count]]
        numbers = [sources.pop(place) for place in places]
        pairs = [(place, targets.pop()) for place in places]
        move = Move(
            move_id, "out" if is_out else "in", tuple(pairs if is_out else [(b, a) for a, b in pairs])
        )
        moving[move_id] = move, numbers
        mover.submit(move)

    def take(results: list[MoveResult]) -> None:
        for result in results:
            assert result.error is None
            move, numbers = moving.pop(result.move.sequence_id)
            for (block, slow_block), number in zip(move.pairs, numbers, strict=True):
                if move.direction == "out":
                    in_file[slow_block] = number
                    free_blocks.add(block)
                    executable.write_block(block, content(executable, 99))
                else:
                    in_pool[block] = number
                    free_slow_blocks.add(slow_block)
                    assert read(executable, block).tobytes() == content(executable, number).tobytes()

    num_moves = 3000
    for move_id in range(num_moves):
        submit(move_id)
        if rng.integers(3) == 0:
            mover.wait(TIMEOUT_SECONDS)
        take(mover.poll())
    if not closes_early:
        while moving:
            mover.wait(TIMEOUT_SECONDS)
            take(mover.poll())
        assert sorted([*in_pool.values(), *in_file.values()]) == list(range(NUM_BLOCKS // 2))
    mover.close()
    assert not mover._thread.is_alive()
    assert list(tmp_path.iterdir()) == []


def test_steps_compute_the_same_bits_while_other_blocks_move(tmp_path: Path) -> None:
    """A sequence decodes on the native backend; the I/O thread moves all blocks that are not its own."""
    pytest.importorskip("fastserve._native")
    from parity import Run, compile_native, make_batch
    from tiny_models import LLAMA_CONFIG, random_parameters, tiny_graph

    graph = tiny_graph(LLAMA_CONFIG)
    limits = Limits(max_tokens=128, max_outputs=128, max_sequences=1, num_blocks=32, max_context=512)
    executable = compile_native(graph, random_parameters(graph), limits=limits, kv_dtype="int8", threads=2)
    table, others = [3, 17, 30, 8, 21, 14, 9], [b for b in range(32) if b not in (3, 17, 30, 8, 21, 14, 9)]

    def step(run: Run, new_ids: list[int]) -> Float32Array:
        batch = replace(make_batch([(run, new_ids)]), block_tables=np.array([table], np.int32))
        run.token_ids += new_ids
        return executable.run(batch).outputs["logits"][-1].copy()

    def decode(between: Callable[[], None]) -> list[bytes]:
        run, rows = Run(executable), []
        new_ids = [i % 97 for i in range(70)]
        for _ in range(140):
            logits = step(run, new_ids)
            rows.append(logits.tobytes())
            new_ids = [int(logits.argmax())]
            between()
        return rows

    expected = decode(lambda: None)
    mover = ThreadMover(
        executable, SpillFile(num_blocks=32, block_bytes=executable.block_bytes, folder=tmp_path)
    )
    for block in others:
        executable.write_block(block, content(executable, block))
    out = Move(1, "out", tuple((block, slow_block) for slow_block, block in enumerate(others)))
    back = Move(1, "in", tuple((block, slow_block) for slow_block, block in enumerate(reversed(others))))
    results: list[MoveResult] = []
    mover.submit(out)

    def submit_next() -> None:
        if finished := mover.poll():
            results.extend(finished)
            mover.submit(back if len(results) % 2 else out)

    deadline = time.monotonic() + TIMEOUT_SECONDS
    while len(results) < 40 and time.monotonic() < deadline:
        assert decode(submit_next) == expected
    assert len(results) >= 40, "moves run beside steps"
    results += results_of(mover, 1)
    mover.close()
    assert all(result.error is None for result in results)
    order = others if len(results) % 4 in (0, 1) else others[::-1]
    for block, number in zip(others, order, strict=True):
        assert read(executable, block).tobytes() == content(executable, number).tobytes()


def test_kv_spill_is_exact_to_the_block(executable: FakeExecutable, tmp_path: Path) -> None:
    for extra in (0, executable.block_bytes - 1):
        kv_spill = 5 * executable.block_bytes + extra
        mover = make_mover(executable, EngineOptions(kv_spill=kv_spill, spill_dir=tmp_path))
        assert mover is not None
        assert mover.num_slow_blocks == 5
        assert isinstance(mover._tier, SpillFile)
        assert os.fstat(mover._tier._file.fileno()).st_size == 5 * executable.block_bytes
        mover.close()


@pytest.mark.parametrize("kv_spill", [None, 0, "0 GiB"])
def test_without_kv_spill_there_is_no_mover(executable: FakeExecutable, kv_spill: int | str | None) -> None:
    assert make_mover(executable, EngineOptions(kv_spill=kv_spill)) is None


def test_kv_spill_that_does_not_hold_a_block_is_refused_and_the_hint_is_right(
    executable: FakeExecutable,
) -> None:
    with pytest.raises(MemoryLimitError, match="kv_spill=31 is less than a block of 4 tokens") as raised:
        make_mover(executable, EngineOptions(kv_spill=executable.block_bytes - 1))
    assert raised.value.hint == "choose kv_spill=32 or more, or leave it out"


def test_a_pool_on_a_device_spills_to_host_memory(
    executable: FakeExecutable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeExecutable, "is_pool_on_host", False)
    mover = make_mover(executable, EngineOptions(kv_spill=4096))
    assert mover is not None
    tier: SlowTier = mover._tier
    assert isinstance(tier, HostTier)
    assert finish(mover, Move(0, "out", ((1, 0),)), Move(0, "in", ((2, 0),)))[1].error is None
    assert read(executable, 2).tobytes() == content(executable, 1).tobytes()
    mover.close()
