"""Whether tenants get what their terms say, over HTTP: two that both want all of the server share by their
weights, and one that is far over its rate is refused and disturbs nobody."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastserve.engine.tenant import COMPLETION_TOKEN_SERVICE, PROMPT_TOKEN_SERVICE
from fastserve.evaluate.arrival import Arrival
from fastserve.evaluate.endpoint import Abilities, Endpoint, EndpointOptions
from fastserve.evaluate.exchange import Exchange, PlannedRequest
from fastserve.evaluate.prompt_text import PromptText, TokenRate
from fastserve.evaluate.trace import data_folder
from fastserve.serve.key_file import Terms, add_admin_key, add_key
from report import make_parser, publish
from serving import RunningServer, add_server_options, measuring, run_servers, versions

_FLOOD = Path(__file__).with_name("flood.py")
_ABILITIES = Abilities(ignores_eos=True, tells_usage=True)
_PROMPT_TOKENS = 40
_WARM_SECONDS = 4.0
_FLOOD_COMPLETION_TOKENS = 8  # of the requests that are within the rate


@dataclass
class Site:
    """A server, its tenants' keys and texts to send."""

    server: RunningServer
    keys: dict[str, str]
    admin_key: str
    text: PromptText = field(default_factory=lambda: PromptText(data_folder()))
    num_prompts: int = 0

    def endpoint(self, tenant: str) -> Endpoint:
        key = self.keys[tenant]
        return Endpoint(EndpointOptions(url=self.server.url, model=self.server.model, api_key=key))

    def exchange(self, completion_tokens: int) -> Exchange:
        """A new request: no two have a prompt in common, which would be found in a cache."""
        self.num_prompts += 1
        arrival = Arrival(
            arrival_seconds=0.0, prompt_tokens=_PROMPT_TOKENS, completion_tokens=completion_tokens
        )
        prompt = self.text.of_arrival(arrival, TokenRate(), (self.num_prompts,))
        return Exchange(
            planned=PlannedRequest(arrival=arrival, prompt=prompt), arrival_seconds=time.perf_counter()
        )

    async def send(self, endpoint: Endpoint, completion_tokens: int) -> Exchange:
        exchange = self.exchange(completion_tokens)
        await endpoint.send(exchange, max_tokens=completion_tokens, abilities=_ABILITIES)
        return exchange

    async def usage(self) -> dict[str, dict[str, Any]]:
        return await asyncio.to_thread(self._usage)

    def _usage(self) -> dict[str, dict[str, Any]]:
        headers = {"Authorization": f"Bearer {self.admin_key}"}
        asked = urllib.request.Request(f"{self.server.url}/admin/usage", headers=headers)
        with urllib.request.urlopen(asked, timeout=10) as answer:
            return {row["name"]: row for row in json.load(answer)["tenants"]}


def main() -> None:
    parser = make_parser(__doc__)
    add_server_options(parser)
    parser.set_defaults(servers=["fastserve"], threads=1, max_sequences=12)
    parser.add_argument("--parts", nargs="+", choices=("share", "flood"), default=["share", "flood"])
    parser.add_argument("--streams", type=int, default=12, help="of each tenant that shares")
    parser.add_argument("--completion-tokens", type=int, default=128, help="of each of their requests")
    parser.add_argument("--windows", type=int, default=6, help="in which their service is compared")
    parser.add_argument("--calm-rate", type=float, default=6.0, help="requests a second beside the flood")
    parser.add_argument("--calm-tokens", type=int, default=32, help="of each of those")
    parser.add_argument("--flood-rate", type=float, default=50.0, help="requests a second of the flood")
    parser.add_argument("--flood-limit", type=int, default=6, help="requests a minute that it may send")
    parser.add_argument("--flood-token-limit", type=int, help="tokens a minute that it may take, instead")
    parser.add_argument("--rounds", type=int, default=9, help="of three parts each")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a window, or a part of a round")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path, admin_path = Path(folder) / "keys", Path(folder) / "admin"
        limits = Terms(requests_per_minute=arguments.flood_limit)
        if arguments.flood_token_limit is not None:
            limits = Terms(tokens_per_minute=arguments.flood_token_limit)
        terms = {
            "heavy": Terms(weight=2.0),
            "light": Terms(weight=1.0),
            "calm": Terms(),
            "flood": limits,
        }
        keys = {name: add_key(path, name, terms=own) for name, own in terms.items()}
        admin_key = add_admin_key(admin_path)
        options = ("--tenants", str(path), "--admin-key-file", str(admin_path))
        with run_servers(arguments, options=options, api_key=keys["calm"]) as servers:
            (server,) = servers.values()
            with measuring(server):
                site = Site(server, keys, admin_key)
                for part in arguments.parts:
                    observe = share if part == "share" else flood
                    results[part] = asyncio.run(observe(site, arguments))
            said = versions([server])
    publish(arguments, {"versions": said, **results}, rows_of(results))


async def share(site: Site, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both tenants always want more than there is: what each is served in windows that follow each other."""
    windows = []
    async with site.endpoint("heavy") as heavy, site.endpoint("light") as light:

        async def go_on(endpoint: Endpoint) -> None:
            while True:
                await site.send(endpoint, arguments.completion_tokens)

        tasks = [
            asyncio.create_task(go_on(endpoint))
            for endpoint in (heavy, light)
            for _ in range(arguments.streams)
        ]
        await asyncio.sleep(_WARM_SECONDS)
        before = await site.usage()
        for _ in range(arguments.windows):
            await asyncio.sleep(arguments.seconds)
            after = await site.usage()
            windows.append(
                {name: {kind: after[name][kind] - before[name][kind] for kind in KINDS} for name in SHARING}
            )
            before = after
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    total = {
        name: {kind: sum(window[name][kind] for window in windows) for kind in KINDS} for name in SHARING
    }
    return {
        "windows": windows,
        "service_ratios": [service_of(window["heavy"]) / service_of(window["light"]) for window in windows],
        "service_ratio": service_of(total["heavy"]) / service_of(total["light"]),
        "seconds_ratio": total["heavy"]["service_seconds"] / total["light"]["service_seconds"],
    }


KINDS = ("prompt_tokens", "completion_tokens", "service_seconds")
SHARING = ("heavy", "light")


def service_of(usage: dict[str, float]) -> float:
    """Service as tenants are charged for it: prompts when requests are taken, not when they are read."""
    prompt, completion = usage["prompt_tokens"], usage["completion_tokens"]
    return PROMPT_TOKEN_SERVICE * prompt + COMPLETION_TOKEN_SERVICE * completion


@dataclass
class Calm:
    """What the tenant beside the flood sees."""

    gaps: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def take(self, exchange: Exchange) -> None:
        if exchange.failure is not None:
            self.failures.append(f"{exchange.failure}: {exchange.message}")
            return
        assert exchange.first_token_seconds is not None
        assert exchange.end_seconds is not None
        self.gaps += exchange.gaps
        self.first_tokens.append(exchange.first_token_seconds - exchange.arrival_seconds)
        self.ends.append(exchange.end_seconds - exchange.arrival_seconds)

    def add(self, other: Calm) -> None:
        self.gaps += other.gaps
        self.first_tokens += other.first_tokens
        self.ends += other.ends
        self.failures += other.failures

    def measures(self) -> dict[str, float]:
        return {
            "first token, mean": float(np.mean(self.first_tokens)),
            "first token, p95": float(np.quantile(self.first_tokens, 0.95)),
            "gap, mean": float(np.mean(self.gaps)),
            "gap, p99": float(np.quantile(self.gaps, 0.99)),
            "end, mean": float(np.mean(self.ends)),
        }


async def flood(site: Site, arguments: argparse.Namespace) -> dict[str, Any]:
    """A tenant's requests without a flood of another's, beside one that is sent elsewhere, and with it, in
    turns, at the same times. The flood's sender is on the server's machine: what it takes itself is in the
    second, a fifth of a refusal of the server's with it, as somebody has to refuse there too. What the third
    has beyond that is what the server's refusals take more."""
    observed = {kind: Calm() for kind in FLOODS}
    rounds: list[dict[str, dict[str, float]]] = []
    outcomes: Counter[str] = Counter()
    async with site.endpoint("calm") as calm:
        await observe_calm(site, calm, arguments, seed=0)
        await send_flood(site, arguments, 1.0)  # uses up the burst that it may send
        for number in range(arguments.rounds):
            measured = {}
            for kind in FLOODS[number % len(FLOODS) :] + FLOODS[: number % len(FLOODS)]:
                flooding = None
                if kind != "without":
                    sending = send_flood(site, arguments, arguments.seconds, is_elsewhere=kind == "elsewhere")
                    flooding = asyncio.create_task(sending)
                seen = await observe_calm(site, calm, arguments, seed=number)
                if flooding is not None:
                    statuses = await flooding
                    outcomes += statuses if kind == "with" else Counter()
                observed[kind].add(seen)
                measured[kind] = seen.measures()
            rounds.append(measured)
    totals = {kind: calm.measures() for kind, calm in observed.items()}
    return {
        "rounds": rounds,
        **totals,
        "ratios": _ratios(totals["with"], totals["elsewhere"]),
        "ratios to no flood": _ratios(totals["with"], totals["without"]),
        "ratios of the sender": _ratios(totals["elsewhere"], totals["without"]),
        "requests": len(observed["with"].ends),
        "flood": dict(outcomes),
        "failures": [failure for calm in observed.values() for failure in calm.failures],
    }


FLOODS = ("without", "elsewhere", "with")


def _ratios(these: dict[str, float], those: dict[str, float]) -> dict[str, float]:
    return {name: these[name] / those[name] for name in these}


async def observe_calm(site: Site, endpoint: Endpoint, arguments: argparse.Namespace, *, seed: int) -> Calm:
    """Requests that come whatever becomes of others (Poisson)."""
    calm, rng = Calm(), np.random.default_rng(seed)
    due = start = time.perf_counter()
    tasks = []
    while (due := due + float(rng.exponential(1 / arguments.calm_rate))) < start + arguments.seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(site.send(endpoint, arguments.calm_tokens)))
    for exchange in await asyncio.gather(*tasks):
        calm.take(exchange)
    return calm


async def send_flood(
    site: Site, arguments: argparse.Namespace, seconds: float, *, is_elsewhere: bool = False
) -> Counter[str]:
    """Requests at a steady rate, whatever becomes of them, from a process of its own: what it takes to send
    them is not to delay those that are measured. That process refuses itself those that go elsewhere."""
    job = {
        "url": None if is_elsewhere else site.server.url,
        "key": site.keys["flood"],
        "body": {
            "model": site.server.model,
            "prompt": "Once upon a time",
            "max_tokens": _FLOOD_COMPLETION_TOKENS,
        },
        "rate": arguments.flood_rate,
        "seconds": seconds,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-S", str(_FLOOD), json.dumps(job), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    return Counter(json.loads(output))


def rows_of(results: dict[str, Any]) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    if shared := results.get("share"):
        ratios = ", ".join(f"{ratio:.3f}" for ratio in shared["service_ratios"])
        rows += [
            ("service, weight 2 to weight 1 (1.8 to 2.2)", f"{shared['service_ratio']:.3f} ({ratios})"),
            ("seconds of service, the same", f"{shared['seconds_ratio']:.3f}"),
        ]
    if flooded := results.get("flood"):
        rows += [
            (f"{name}, with the flood to one sent elsewhere (1.05 at most)", f"{ratio:.3f}")
            for name, ratio in flooded["ratios"].items()
        ]
        rows += [
            (f"{name}, with the flood to none, its sender's work included", f"{ratio:.3f}")
            for name, ratio in flooded["ratios to no flood"].items()
        ]
        rows += [("the flood", flooded["flood"]), ("failures beside it", len(flooded["failures"]))]
    return rows


if __name__ == "__main__":
    main()
