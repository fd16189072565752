"""Thousands of real requests: nothing stuck, nothing leaked."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from fastserve.config import EngineOptions
from fastserve.engine.async_llm import AsyncLLM
from fastserve.engine.policy import POLICY_NAMES
from fastserve.types import SamplingParams

pytest.importorskip("fastserve._native")
resource = pytest.importorskip("resource")

NUM_REQUESTS = 5000
NUM_CALLERS = 48


@pytest.mark.slow
def test_five_thousand_requests_with_cancels_and_changes_of_policy_leave_nothing_behind(
    stories: Path,
) -> None:
    """Memory for some ten sequences at once, and a slow tier. A block of this model in f16 is 40 KiB."""
    options = EngineOptions(
        context_length=256, kv_memory="1MiB", kv_spill="4MiB", max_sequences=16, policy="boost"
    )

    async def main() -> None:
        rng = random.Random(3)
        numbers = iter(range(NUM_REQUESTS))
        peaks = []
        async with AsyncLLM(stories, options) as llm:

            async def call() -> None:
                for number in numbers:
                    if number % 500 == 0:
                        await llm.set_policy(rng.choice(POLICY_NAMES))
                        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
                    prompt = [rng.randrange(3, 500) for _ in range(rng.randint(1, 120))]
                    params = SamplingParams(max_tokens=rng.randint(1, 100), seed=number, ignore_eos=True)
                    stream = await llm.submit(prompt, params, tenant=str(number % 3))
                    most = rng.choice([0, 1, 10, 10**6, 10**6])
                    num_read = 0
                    async for _ in stream:
                        num_read += 1
                        if num_read >= most:
                            break
                    stream.close()
                    assert most < 10**6 or num_read == params.max_tokens

            await asyncio.gather(*(call() for _ in range(NUM_CALLERS)))
            status = await llm.status()
            while status.num_waiting or status.num_resident or status.num_slow:
                status = await llm.status()
            assert status.num_free_blocks == status.num_blocks
            assert status.num_slow_blocks_used == 0
            assert status.residency.evictions > 0
            assert not llm._streams
            assert not llm._answers
            assert not llm._worker._tickets
        assert peaks[-1] < 1.05 * peaks[2]

    asyncio.run(asyncio.wait_for(main(), timeout=1500))
