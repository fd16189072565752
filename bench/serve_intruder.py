"""What a long prompt does to the streams of others, over HTTP: eight chats, and one of 1,500 tokens every
three seconds. Peers, where there are any, are measured beside in the same run."""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastserve.evaluate.arrival import Arrival
from fastserve.evaluate.endpoint import Abilities, Endpoint, EndpointOptions
from fastserve.evaluate.exchange import Exchange, PlannedRequest
from fastserve.evaluate.prompt_text import LONG_WORDS, SHORT_WORDS, PromptText, TokenRate
from fastserve.evaluate.trace import data_folder
from report import make_parser, publish
from serving import RunningServer, add_server_options, measuring, run_servers, versions

_CHAT_PROMPT_TOKENS = 40
_LONGEST_CHAT_TOKENS = 1024
_WARM_SECONDS = 5.0


@dataclass
class Observation:
    """Seconds between the pieces of text of all chats, and of each intruder to its first one."""

    gaps: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def p99_gap(self) -> float:
        return float(np.quantile(self.gaps, 0.99)) if self.gaps else float("nan")


class Scene:
    """The chats and the intruders of one server."""

    def __init__(self, endpoint: Endpoint, arguments: argparse.Namespace) -> None:
        self._endpoint = endpoint
        self._arguments = arguments
        self._text = PromptText(data_folder())
        self._rate = TokenRate()
        self._abilities = Abilities(ignores_eos=True, tells_usage=True)
        self._num_prompts = 0

    async def prepare(self) -> None:
        """Learn what a word takes, and have the server learn what its steps take."""
        counts = []
        for words in (SHORT_WORDS, LONG_WORDS):
            arrival = Arrival(arrival_seconds=0.0, prompt_tokens=words, completion_tokens=1)
            prompt = self._text.of_words(words, (words,))
            probe = Exchange(
                planned=PlannedRequest(arrival=arrival, prompt=prompt), arrival_seconds=time.perf_counter()
            )
            self._abilities = await self._endpoint.learn_abilities(probe)
            counts.append(probe.prompt_tokens or words)
        self._rate = TokenRate.from_counts(*counts)
        await self.observe(_WARM_SECONDS, has_intruders=True)

    async def observe(self, seconds: float, *, has_intruders: bool) -> Observation:
        observation = Observation()
        end = time.perf_counter() + seconds
        tasks = [self._chat(end, observation) for _ in range(self._arguments.chats)]
        await asyncio.gather(*tasks, *([self._intrude(end, observation)] if has_intruders else []))
        return observation

    async def _chat(self, end: float, observation: Observation) -> None:
        """Stream after stream, until the end."""
        while (left := end - time.perf_counter()) > 0:
            exchange = self._exchange(_CHAT_PROMPT_TOKENS, _LONGEST_CHAT_TOKENS)
            task = asyncio.create_task(self._send(exchange))
            await asyncio.wait((task,), timeout=left)
            observation.gaps += exchange.gaps
            if exchange.failure is not None:
                observation.failures.append(f"{exchange.failure}: {exchange.message}")
                await asyncio.sleep(0.2)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _intrude(self, end: float, observation: Observation) -> None:
        exchanges, tasks = [], []
        while (start := time.perf_counter()) < end - self._arguments.every:
            exchange = self._exchange(self._arguments.prompt_tokens, 1)
            exchanges.append(exchange)
            tasks.append(asyncio.create_task(self._send(exchange)))
            await asyncio.sleep(start + self._arguments.every - time.perf_counter())
        await asyncio.gather(*tasks)
        for exchange in exchanges:
            if exchange.first_token_seconds is not None:
                observation.first_tokens.append(exchange.first_token_seconds - exchange.arrival_seconds)
            else:
                observation.failures.append(f"{exchange.failure}: {exchange.message}")

    def _exchange(self, prompt_tokens: int, completion_tokens: int) -> Exchange:
        self._num_prompts += 1
        arrival = Arrival(
            arrival_seconds=0.0, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens
        )
        prompt = self._text.of_arrival(arrival, self._rate, (self._num_prompts,))
        return Exchange(
            planned=PlannedRequest(arrival=arrival, prompt=prompt), arrival_seconds=time.perf_counter()
        )

    async def _send(self, exchange: Exchange) -> None:
        tokens = exchange.planned.arrival.completion_tokens
        await self._endpoint.send(exchange, max_tokens=tokens, abilities=self._abilities)


def main() -> None:
    parser = make_parser(__doc__)
    add_server_options(parser)
    parser.add_argument("--chats", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=1500, help="of the intruder")
    parser.add_argument("--every", type=float, default=3.0, help="seconds between intruders")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a part")
    parser.add_argument("--rounds", type=int, default=2, help="of a part without and one with intruders")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with run_servers(arguments) as servers:
        for name, server in servers.items():
            with measuring(server):
                results[name] = asyncio.run(observe_rounds(server, arguments))
        said = versions(list(servers.values()))
    rows: list[tuple[str, object]] = []
    for name, result in results.items():
        rows += [
            (f"{name}: p99 gap without, seconds", _list(result["p99_gap_without_seconds"])),
            (f"{name}: p99 gap with, seconds", _list(result["p99_gap_with_seconds"])),
            (f"{name}: ratio (ours: 2 at most)", f"{result['p99_gap_ratio_median']:.2f}"),
            (f"{name}: first token (ours: 3 at most)", f"{result['first_token_max_seconds']:.2f} at most"),
            (f"{name}: failures", len(result["failures"])),
        ]
    publish(arguments, {"versions": said, "servers": results}, rows)


async def observe_rounds(server: RunningServer, arguments: argparse.Namespace) -> dict[str, Any]:
    rounds: list[tuple[Observation, Observation]] = []
    start, cpu = time.perf_counter(), time.process_time()
    async with Endpoint(EndpointOptions(url=server.url, model=server.model)) as endpoint:
        scene = Scene(endpoint, arguments)
        await scene.prepare()
        for _ in range(arguments.rounds):
            without = await scene.observe(arguments.seconds, has_intruders=False)
            rounds.append((without, await scene.observe(arguments.seconds, has_intruders=True)))
    first_tokens = [seconds for _, with_ in rounds for seconds in with_.first_tokens]
    return {
        "p99_gap_without_seconds": [without.p99_gap for without, _ in rounds],
        "p99_gap_with_seconds": [with_.p99_gap for _, with_ in rounds],
        "p99_gap_ratio_median": float(
            np.median([with_.p99_gap / without.p99_gap for without, with_ in rounds])
        ),
        "first_token_seconds": first_tokens,
        "first_token_max_seconds": max(first_tokens, default=float("inf")),
        "texts_per_second": sum(len(without.gaps) for without, _ in rounds)
        / (arguments.rounds * arguments.seconds),
        "failures": [failure for part in rounds for o in part for failure in o.failures],
        "client_cpu_share": (time.process_time() - cpu) / (time.perf_counter() - start),
    }


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


if __name__ == "__main__":
    main()
