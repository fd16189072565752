"""Two tenants share a model: one floods it, the other asks now and then, and some of it has a deadline.

    python examples/two_tenants.py

The same load runs twice, with tenants that make no difference and with tenants that share fairly.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from statistics import mean

from fastserve import AsyncLLM, SamplingParams
from fastserve.config import EngineOptions, FairShare
from fastserve.errors import DeadlineError

STORY = SamplingParams(max_tokens=48, ignore_eos=True)
ANSWER = SamplingParams(max_tokens=8, ignore_eos=True)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    model = parser.parse_args().model
    for fair_share in ("off", "tenant"):
        await run(model, fair_share)


async def run(model: str, fair_share: FairShare) -> None:
    # Weights only where tenants matter: the paying tenant is to get twice the service under contention.
    weights = {"paying": 2.0, "free": 1.0} if fair_share == "tenant" else None
    options = EngineOptions(
        context_length=512,
        max_sequences=4,
        policy="fcfs",  # to see what tenants do alone: the default policy lets short answers overtake as well
        fair_share=fair_share,
        tenant_weights=weights,
    )
    async with AsyncLLM(model, options) as llm:
        await llm.generate("Hello", ANSWER)  # so that the first steps are not measured
        flood = [asyncio.create_task(timed(llm, "free", STORY)) for _ in range(16)]
        await asyncio.sleep(0.2)
        questions = [asyncio.create_task(timed(llm, "paying", ANSWER)) for _ in range(6)]
        refusal = await ask_with_deadline(llm)
        paying, free = await asyncio.gather(asyncio.gather(*questions), asyncio.gather(*flood))
    print(f"fair_share={fair_share}: paying {mean(paying):.2f} s, free {mean(free):.2f} s on average")
    print(f"  {refusal}")


async def timed(llm: AsyncLLM, tenant: str, params: SamplingParams) -> float:
    """Seconds until a completion of the tenant's is there."""
    start = time.perf_counter()
    (completion,) = await llm.generate(f"A question of the {tenant} tenant:", params, tenant=tenant)
    completion.checked()
    return time.perf_counter() - start


async def ask_with_deadline(llm: AsyncLLM) -> str:
    """400 tokens in 100 ms: refused at once, for its own length and what is before it."""
    start = time.perf_counter()
    params = SamplingParams(max_tokens=400, ignore_eos=True)
    try:
        (completion,) = await llm.generate("Once upon a time", params, tenant="free", timeout_ms=100)
        completion.checked()
    except DeadlineError as error:
        return f"after {1000 * (time.perf_counter() - start):.0f} ms: {error.message}"
    return "the deadline was kept"


if __name__ == "__main__":
    asyncio.run(main())
