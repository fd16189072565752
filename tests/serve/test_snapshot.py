"""Snapshots of a server: what they say, and that watching costs little."""

from __future__ import annotations

import asyncio
import json
import mmap
from dataclasses import asdict, replace

from fastserve.engine.snapshot import (
    Blocks,
    EngineSnapshot,
    EngineTotals,
    FastBlocks,
    PreemptionSnapshot,
    PrefixTokens,
    SequenceSnapshot,
    SlowBlocks,
)
from fastserve.errors import ClosedError
from fastserve.serve.snapshot import (
    Energy,
    ModelMemory,
    ModelSnapshot,
    Snapshots,
    TenantSnapshot,
    resident_bytes,
    to_text,
)

SEQUENCE = SequenceSnapshot(7, "req-1", "ann", "standard", "running", 2, 0, 10, 10, 3, 20, 1.5, 0.5, 1, 4)
ENGINE = EngineSnapshot(
    model="stories",
    policy="boost",
    policy_spec="boost:strength=2",
    num_sequences=1,
    num_unstarted=0,
    blocks=Blocks(FastBlocks(64, 4, 2), SlowBlocks(0, 0)),
    prefix_tokens=PrefixTokens(8, 2),
    totals=EngineTotals(10, 3, 0, 4, 1, 0, 0),
    preemptions={"evicted": 1, "passed_over": 0},
    step_seconds=0.01,
    sequences=[SEQUENCE],
    recent_preemptions=[PreemptionSnapshot(1.0, 7, "ann", "evicted", None)],
)
MODEL = ModelSnapshot(
    name="stories",
    state="loaded",
    is_pinned=True,
    memory_bytes=5,
    num_requests=1,
    num_waiting=0,
    num_loads=1,
    idle_seconds=None,
    task="generate",
)
TENANT = TenantSnapshot(
    name="ann",
    weight=2.0,
    num_running=1,
    requests=3,
    prompt_tokens=30,
    completion_tokens=3,
    service_seconds=0.5,
    joules=None,
    refused=0,
)


class FakeEngine:
    """Answers when it is let, as an engine does between two steps."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.is_free = asyncio.Event()
        self.is_free.set()
        self.has_ended = False

    async def snapshot(self) -> EngineSnapshot:
        self.num_asked += 1
        await self.is_free.wait()
        if self.has_ended:
            raise ClosedError("it is closed")
        return replace(ENGINE, num_unstarted=self.num_asked)


def snapshots_of(*engines: FakeEngine) -> Snapshots:
    return Snapshots(
        lambda: engines,
        read_models=lambda: [MODEL],
        read_memory=lambda: ModelMemory(None, 5),
        read_tenants=lambda: [TENANT],
        read_energy=lambda: Energy(12.5),
        is_draining=lambda: True,
    )


def test_a_snapshot_is_written_whole_as_it_is_declared() -> None:
    snapshot = asyncio.run(snapshots_of(FakeEngine()).take())
    document = json.loads(to_text(snapshot))
    assert document == json.loads(json.dumps(asdict(snapshot)))
    assert document["engines"][0]["sequences"][0]["request_id"] == "req-1"
    assert document["engines"][0]["blocks"] == {
        "fast": {"total": 64, "used": 4, "cached": 2},
        "slow": {"total": 0, "used": 0},
    }
    assert document["energy"] == {"watts": 12.5}
    assert document["is_draining"] is True
    assert (document["models"][0]["name"], document["tenants"][0]["name"]) == ("stories", "ann")
    assert 1_000_000 < document["memory"]["resident_bytes"] < 1e12


def test_texts_have_no_line_breaks_whatever_tenants_are_called() -> None:
    engine = replace(ENGINE, sequences=[replace(SEQUENCE, tenant="a\nb\r\u2028\x00c")])
    snapshot = replace(asyncio.run(snapshots_of().take()), engines=[engine])
    text = to_text(snapshot)
    assert b"\n" not in text
    assert b"\r" not in text
    assert json.loads(text)["engines"][0]["sequences"][0]["tenant"] == "a\nb\r\u2028\x00c"


def test_who_watch_together_are_shown_the_same_snapshot() -> None:
    async def main() -> None:
        engine = FakeEngine()
        snapshots = snapshots_of(engine)
        watchers = [snapshots.watch(0.2) for _ in range(20)]
        for _ in range(3):
            texts = await asyncio.gather(*map(anext, watchers))
            assert len(set(texts)) == 1
        assert engine.num_asked == 3

    asyncio.run(main())


def test_a_text_without_an_age_is_always_a_new_one() -> None:
    async def main() -> None:
        snapshots = snapshots_of(FakeEngine())
        first, second = [json.loads(await snapshots.text()) for _ in range(2)]
        assert [d["engines"][0]["num_unstarted"] for d in (first, second)] == [1, 2]

    asyncio.run(main())


def test_an_engine_in_a_long_step_is_shown_as_it_was_and_asked_once() -> None:
    async def main() -> None:
        engine, other = FakeEngine(), FakeEngine()
        snapshots = snapshots_of(engine, other)
        await snapshots.take()
        engine.is_free.clear()
        for seen in (2, 3):
            snapshot = await snapshots.take()
            assert [e.num_unstarted for e in snapshot.engines] == [1, seen]
        assert (engine.num_asked, other.num_asked) == (2, 3)
        engine.is_free.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert [e.num_unstarted for e in (await snapshots.take()).engines] == [3, 4]

    asyncio.run(main())


def test_an_engine_that_has_ended_is_shown_as_it_was_and_one_that_is_gone_no_more() -> None:
    async def main() -> None:
        engines = [FakeEngine(), FakeEngine()]
        snapshots = Snapshots(lambda: engines, read_models=list, read_memory=lambda: ModelMemory(None, 0))
        assert len((await snapshots.take()).engines) == 2
        engines[0].has_ended = True
        assert len((await snapshots.take()).engines) == 2
        del engines[1]
        assert [e.num_unstarted for e in (await snapshots.take()).engines] == [1]

    asyncio.run(main())


def test_who_watches_is_let_go_at_once_when_the_server_ends() -> None:
    async def main() -> None:
        snapshots = snapshots_of(FakeEngine())

        async def watch() -> int:
            return len([text async for text in snapshots.watch(60)])

        watching = asyncio.create_task(watch())
        await asyncio.sleep(0.05)
        snapshots.close()
        assert await asyncio.wait_for(watching, 1) == 1

    asyncio.run(main())


def test_texts_come_at_the_interval() -> None:
    async def main() -> None:
        snapshots = snapshots_of(FakeEngine())
        loop = asyncio.get_running_loop()
        started = loop.time()
        async for text in snapshots.watch(0.1):
            if json.loads(text)["engines"][0]["num_unstarted"] == 4:
                break
        assert 0.3 <= loop.time() - started < 2

    asyncio.run(main())


def test_memory_of_the_process_is_what_the_system_says() -> None:
    before = resident_bytes()
    with mmap.mmap(-1, 64_000_000) as ballast:  # pages of its own: the heap may have some that were freed
        ballast.write(b"x" * 64_000_000)
        assert 50e6 < resident_bytes() - before < 150e6
