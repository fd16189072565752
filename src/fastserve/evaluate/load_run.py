"""Requests sent to a server as they would come: at their times whatever the server does, or so many at once.

In an open loop a request counts from when it was to be sent, so that a client that is late hides nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastserve.evaluate.endpoint import Abilities, Endpoint
from fastserve.evaluate.exchange import Exchange, PlannedRequest

GIVEN_UP = "given up"  # the failure of what had not ended when the run was stopped
STALLED = "stalled"
_LOOK_SECONDS = 0.25

Observe = Callable[[Seq[Exchange], float], bool]
"""Called now and then with what was sent and the time; True stops the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRun:
    """What was sent, in the order of sending, and what the client took for it."""

    exchanges: Seq[Exchange]
    start_seconds: float
    end_seconds: float
    client_cpu_seconds: float
    was_stopped: bool  # by its observer, before all was sent and answered


async def run_open_loop(
    endpoint: Endpoint,
    planned: Seq[PlannedRequest],
    abilities: Abilities,
    *,
    stall_seconds: float,
    observe: Observe | None = None,
) -> LoadRun:
    """Send every request at its time, however many are under way.

    Args:
        stall_seconds: a request that brings no text for so long is given up.

    Raises:
        Exception: what `Endpoint.send` raised, which is a defect of the client: no failure of the server.
    """
    start = time.perf_counter()
    exchanges: list[Exchange] = []
    tasks: list[asyncio.Task[None]] = []

    async def send_all() -> None:
        for request in planned:
            due = start + request.arrival.arrival_seconds
            await asyncio.sleep(max(due - time.perf_counter(), 0.0))
            exchange = Exchange(planned=request, arrival_seconds=due)
            exchanges.append(exchange)
            tasks.append(asyncio.create_task(_send(endpoint, exchange, abilities)))
        await asyncio.wait(tasks)

    return await _run(send_all, exchanges, tasks, stall_seconds=stall_seconds, observe=observe)


async def run_closed_loop(
    endpoint: Endpoint,
    planned: Seq[PlannedRequest],
    abilities: Abilities,
    *,
    concurrency: int,
    stall_seconds: float,
    observe: Observe | None = None,
) -> LoadRun:
    """Send each request as soon as one of so many under way has ended. Raises as `run_open_loop`."""
    exchanges: list[Exchange] = []
    tasks: list[asyncio.Task[None]] = []

    async def send_in_turn(remaining: Iterator[PlannedRequest]) -> None:
        for request in remaining:
            exchange = Exchange(planned=request, arrival_seconds=time.perf_counter())
            exchanges.append(exchange)
            task = asyncio.create_task(_send(endpoint, exchange, abilities))
            tasks.append(task)
            await asyncio.wait((task,))  # does not fail where the one request is given up

    async def send_all() -> None:
        remaining = iter(planned)
        await asyncio.gather(*(send_in_turn(remaining) for _ in range(concurrency)))

    return await _run(send_all, exchanges, tasks, stall_seconds=stall_seconds, observe=observe)


async def _run(
    send_all: Callable[[], Coroutine[Any, Any, None]],
    exchanges: list[Exchange],
    tasks: list[asyncio.Task[None]],
    *,
    stall_seconds: float,
    observe: Observe | None,
) -> LoadRun:
    """Until all has been sent and has ended, or the observer stops it."""
    start, cpu_start = time.perf_counter(), time.process_time()
    was_stopped = False
    sender = asyncio.create_task(send_all())
    try:
        while not sender.done():
            await asyncio.wait((sender,), timeout=_LOOK_SECONDS)
            now = time.perf_counter()
            for exchange, task in zip(exchanges, tasks, strict=False):
                if not exchange.has_ended and now - exchange.last_news_seconds > stall_seconds:
                    exchange.fail(STALLED, f"nothing came for {stall_seconds:g} seconds")
                    task.cancel()
            if observe is not None and observe(exchanges, now):
                was_stopped = True
                break
    finally:
        sender.cancel()
        for exchange, task in zip(exchanges, tasks, strict=False):
            if not task.done():
                exchange.fail(GIVEN_UP, "the run was stopped")
                task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(asyncio.CancelledError):
            await sender
    for outcome in outcomes:
        if outcome is not None and not isinstance(outcome, asyncio.CancelledError):
            raise outcome
    return LoadRun(
        exchanges=exchanges,
        start_seconds=start,
        end_seconds=time.perf_counter(),
        client_cpu_seconds=time.process_time() - cpu_start,
        was_stopped=was_stopped,
    )


async def _send(endpoint: Endpoint, exchange: Exchange, abilities: Abilities) -> None:
    await endpoint.send(exchange, max_tokens=exchange.planned.arrival.completion_tokens, abilities=abilities)
