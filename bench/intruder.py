"""What a long prompt does to the streams that are running: gaps between their tokens with and without it."""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from fastserve.config import EngineOptions, ScheduleOptions
from fastserve.engine.async_llm import AsyncLLM
from fastserve.engine.cost import StepCost
from fastserve.types import SamplingParams
from report import DEFAULT_MODEL, make_parser, publish

_LONGEST_CHAT_TOKENS = 1024


@dataclass
class Observation:
    """Seconds between the tokens of all chats, and of every intruder from its arrival to its first token."""

    gaps: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)

    @property
    def p99_gap(self) -> float:
        return float(np.quantile(self.gaps, 0.99))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--chats", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=1500, help="of the intruder")
    parser.add_argument("--every", type=float, default=3.0, help="seconds between intruders")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a part")
    parser.add_argument("--rounds", type=int, default=3, help="of a part without and one with intruders")
    parser.add_argument("--policy", default="boost")
    parser.add_argument("--most-slack-seconds", type=float, default=ScheduleOptions().most_slack_seconds)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    options = EngineOptions(
        policy=arguments.policy,
        most_slack_seconds=arguments.most_slack_seconds,
        threads=arguments.threads,
        kv_memory="2GiB",
        prefix_cache="off",  # every intruder is new
    )
    rounds, cost = asyncio.run(observe_rounds(arguments.model, options, arguments))
    ratios = [with_.p99_gap / without.p99_gap for without, with_ in rounds]
    first_tokens = [seconds for _, with_ in rounds for seconds in with_.first_tokens]
    publish(
        arguments,
        {
            "p99_gap_without_seconds": [without.p99_gap for without, _ in rounds],
            "p99_gap_with_seconds": [with_.p99_gap for _, with_ in rounds],
            "p99_gap_ratio_median": float(np.median(ratios)),
            "first_token_seconds": first_tokens,
            "fitted_cost": asdict(cost),
        },
        [
            ("p99 gap without intruders, seconds", _list(without.p99_gap for without, _ in rounds)),
            ("p99 gap with intruders, seconds", _list(with_.p99_gap for _, with_ in rounds)),
            ("ratio of a round", _list(ratios)),
            ("median ratio (bound: 2)", f"{np.median(ratios):.2f}"),
            ("intruders' first token, seconds", f"{max(first_tokens):.2f} at most (bound: 3)"),
            ("the fitted cost of a step, microseconds", _microseconds(cost)),
        ],
    )


async def observe_rounds(
    model: str, options: EngineOptions, arguments: Namespace
) -> tuple[list[tuple[Observation, Observation]], StepCost]:
    rounds = []
    async with AsyncLLM(model, options) as llm:
        await observe(llm, arguments, seconds=5.0, has_intruders=True)  # the cost of a step is learned
        for _ in range(arguments.rounds):
            without = await observe(llm, arguments, has_intruders=False)
            rounds.append((without, await observe(llm, arguments, has_intruders=True)))
        return rounds, (await llm.status()).cost


async def observe(
    llm: AsyncLLM, arguments: Namespace, *, has_intruders: bool, seconds: float | None = None
) -> Observation:
    seconds = seconds or arguments.seconds
    observation = Observation()
    end = time.perf_counter() + seconds
    chats = [chat(llm, index, end, observation) for index in range(arguments.chats)]
    jobs = [*chats, intrude(llm, arguments, end, observation)] if has_intruders else chats
    await asyncio.gather(*jobs)
    return observation


async def chat(llm: AsyncLLM, index: int, end: float, observation: Observation) -> None:
    """Stream after stream, until the end."""
    prompt = [(index * 31 + position) % 1000 + 1000 for position in range(40)]
    while time.perf_counter() < end:
        params = SamplingParams(max_tokens=_LONGEST_CHAT_TOKENS, ignore_eos=True)
        last = None
        async for _ in llm.stream(prompt, params):
            now = time.perf_counter()
            if last is not None:
                observation.gaps.append(now - last)
            last = now
            if now > end:
                break


async def intrude(llm: AsyncLLM, arguments: Namespace, end: float, observation: Observation) -> None:
    tasks = []
    number = 0
    while (start := time.perf_counter()) < end - arguments.every:
        number += 1
        prompt = [
            (number * 7919 + position * 31) % 40000 + 100 for position in range(arguments.prompt_tokens)
        ]
        tasks.append(asyncio.create_task(first_token(llm, prompt)))
        await asyncio.sleep(start + arguments.every - time.perf_counter())
    observation.first_tokens += await asyncio.gather(*tasks)


async def first_token(llm: AsyncLLM, prompt: Sequence[int]) -> float:
    start = time.perf_counter()
    stream = await llm.submit(prompt, SamplingParams(max_tokens=1))
    await anext(stream)
    stream.close()
    return time.perf_counter() - start


def _microseconds(cost: StepCost) -> str:
    return ", ".join(
        f"{name.removesuffix('_seconds')} {1e6 * value:.4g}" for name, value in asdict(cost).items()
    )


def _list(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


if __name__ == "__main__":
    main()
