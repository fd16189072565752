"""Whether the simulator tells what the engine does, and what policies make of it: the same
requests, in real time and simulated."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastserve.config import EngineOptions, ScheduleOptions
from fastserve.engine.engine import Engine
from fastserve.engine.load import load_model
from fastserve.engine.loaded_model import LoadedModel
from fastserve.evaluate.arrival import Arrival
from fastserve.evaluate.capacity import mean_work, measure_capacity
from fastserve.evaluate.fit_cost import StepRecorder, fit_cost
from fastserve.evaluate.latency import latencies
from fastserve.evaluate.mix import MIXES, make_traffic
from fastserve.evaluate.simulate import simulate
from fastserve.evaluate.simulated_machine import SimulatedCost, SimulatedMachine
from fastserve.evaluate.trace import DATA_VARIABLE, data_folder
from fastserve.evaluate.traffic import scale_lengths, scale_to_rate
from fastserve.evaluate.workload import make_prompts
from fastserve.hub.resolve import resolve
from fastserve.types import SamplingParams
from report import DEFAULT_MODEL, make_parser, publish

CALIBRATION_REQUESTS = 100
NUM_WARM_UP_STEPS = 20


@dataclass
class RealRun:
    """Seconds from the run's start, [n]; steps with what they were made of."""

    first: np.ndarray
    end: np.ndarray
    features: list[tuple[int, ...]]
    seconds: list[float]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--policies", nargs="+", default=["fcfs", "sjf", "mlfq"])
    parser.add_argument("--mix", choices=tuple(MIXES), default="short-chat")
    parser.add_argument(
        "--data", type=Path, help=f"folder of traces, of which mixes take lengths (also: {DATA_VARIABLE})"
    )
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--load", type=float, default=0.7, help="of the capacity by the calibration")
    parser.add_argument("--length-scale", type=float, default=0.25, help="of the mix's lengths")
    parser.add_argument("--max-sequences", type=int, default=16)
    arguments = parser.parse_args()
    options = EngineOptions(max_sequences=arguments.max_sequences, context_length=2048, kv_memory="256MiB")
    model = load_model(resolve(arguments.model), options)
    traffic = make_traffic(arguments.mix, data=data_folder(arguments.data))
    requests = scale_lengths(
        traffic.arrivals(arguments.requests, 0), arguments.length_scale, max_completion_tokens=256
    )

    # The rate comes from a short run at full load; what is simulated, from the steps of the runs themselves.
    saturated = run_real(model, "fcfs", [at_once(r) for r in requests[:CALIBRATION_REQUESTS]])
    machine = make_machine(model, fit(saturated))
    rate = arguments.load * measure_capacity(machine, requests) / mean_work(machine, requests)
    arrivals = scale_to_rate(requests, rate)
    results: dict[str, Any] = {"requests_per_second": rate}
    rows: list[tuple[str, object]] = [("requests per second", f"{rate:.2f}")]
    for policy in arguments.policies:
        real = run_real(model, policy, arrivals)
        cost = fit(real)
        simulated = simulate(
            make_machine(model, cost), ScheduleOptions(policy=policy, fair_share="off"), arrivals
        )
        times = np.array([a.arrival_seconds for a in arrivals])
        counted = slice(-len(latencies(simulated)["ttft_seconds"]), None)
        ttft, e2e = (real.first - times)[counted], (real.end - times)[counted]
        means = {
            "ttft": (float(ttft.mean()), "ttft_seconds"),
            "e2e": (float(e2e.mean()), "e2e_seconds"),
        }
        p99 = float(np.quantile(e2e, 0.99))
        results[policy] = {"cost": asdict(cost), "real_e2e_p99_seconds": p99}
        for name, (mean, latency) in means.items():
            told = float(latencies(simulated)[latency].mean())
            results[policy] |= {f"real_{name}_mean_seconds": mean, f"simulated_{name}_mean_seconds": told}
            rows.append(
                (f"{policy}: mean {name}", f"{mean:.3f} s, simulated {told:.3f} ({told / mean - 1:+.1%})")
            )
        first = results[arguments.policies[0]]
        for name, figure in (("mean", "real_e2e_mean_seconds"), ("p99", "real_e2e_p99_seconds")):
            ratio = results[policy][figure] / first[figure]
            rows.append((f"{policy}: {name} e2e to {arguments.policies[0]}", f"{ratio:.3f}"))
    publish(arguments, results, rows)


def run_real(model: LoadedModel, policy: str, arrivals: list[Arrival]) -> RealRun:
    """Requests through the real engine at their times, none waited for before it is let in."""
    recorder = StepRecorder(model.executable)
    engine = Engine(
        recorder,
        eos_token_ids=(),
        make_decoder=model.tokenizer.stream_decoder,
        context_length=model.context_length,
        options=ScheduleOptions(policy=policy, prefix_cache="off", fair_share="off"),
    )
    prompts = [
        draw_prompt(index, a.prompt_tokens, model.executable.vocab_size) for index, a in enumerate(arrivals)
    ]
    run = RealRun(np.full(len(arrivals), np.nan), np.full(len(arrivals), np.nan), [], [])
    indices: dict[int, int] = {}
    start = time.perf_counter()
    num_arrived = 0
    while num_arrived < len(arrivals) or engine.has_work:
        now = time.perf_counter()
        while num_arrived < len(arrivals) and arrivals[num_arrived].arrival_seconds <= now - start:
            arrival = arrivals[num_arrived]
            params = SamplingParams(max_tokens=arrival.completion_tokens, ignore_eos=True)
            request_id = engine.add(
                prompts[num_arrived],
                params,
                arrival_seconds=start + arrival.arrival_seconds,
                tenant=arrival.tenant,
            )
            indices[request_id] = num_arrived
            num_arrived += 1
        if not engine.has_work:
            time.sleep(max(start + arrivals[num_arrived].arrival_seconds - time.perf_counter(), 0.0))
            continue
        started = time.perf_counter()
        chunks = engine.step()
        ended = time.perf_counter()
        run.features.append(recorder.features)
        run.seconds.append(ended - started)
        for chunk in chunks:
            index = indices[chunk.request_id]
            if np.isnan(run.first[index]):
                run.first[index] = ended - start
            if chunk.completion is not None:
                run.end[index] = ended - start
    return run


def fit(run: RealRun) -> SimulatedCost:
    """By the seconds of the steps, disturbed ones too: they have delayed the requests."""
    features, seconds = run.features[NUM_WARM_UP_STEPS:], run.seconds[NUM_WARM_UP_STEPS:]
    cost, _ = fit_cost(np.array(features, np.float64), np.array(seconds), is_relative=False)
    predicted = sum(np.array(features, np.float64) @ np.array(coefficients(cost)))
    correction = sum(seconds) / float(predicted)
    return SimulatedCost(**{name: value * correction for name, value in asdict(cost).items()})


def coefficients(cost: SimulatedCost) -> list[float]:
    return [
        cost.fixed_seconds,
        cost.prefill_seconds,
        cost.decode_seconds,
        cost.prefill_attended_seconds,
        cost.decode_attended_seconds,
    ]


def make_machine(model: LoadedModel, cost: SimulatedCost) -> SimulatedMachine:
    limits = model.executable.limits
    return SimulatedMachine(
        name="this",
        source="schedule_against_engine.py",
        cost=cost,
        max_tokens=limits.max_tokens,
        max_sequences=min(limits.max_sequences, limits.max_outputs),
        block_size=model.executable.block_size,
        num_blocks=limits.num_blocks,
        num_slow_blocks=0,
        swap_seconds_per_block=0.0,
        is_swap_duplex=False,
    )


def at_once(request: Arrival) -> Arrival:
    return replace(request, arrival_seconds=0.0)


def draw_prompt(index: int, num_tokens: int, vocab_size: int) -> list[int]:
    """Unlike all others from its first token on, so that no prefix is shared."""
    return [vocab_size // 2 + index, *make_prompts(1, num_tokens, vocab_size)[0][1:]]


if __name__ == "__main__":
    main()
