"""What steps of a model cost on this machine: real ones timed whole, and coefficients that explain them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np

from fastserve.config import EngineOptions, ScheduleOptions
from fastserve.engine.engine import Engine
from fastserve.engine.loaded_model import LoadedModel
from fastserve.engine.mover import Direction, Move, ThreadMover
from fastserve.engine.tier import SpillFile
from fastserve.errors import MeasurementError
from fastserve.evaluate.arrival import Arrival
from fastserve.evaluate.mix import short_chat
from fastserve.evaluate.simulated_machine import SimulatedCost, SimulatedMachine
from fastserve.evaluate.workload import make_prompts
from fastserve.types import Batch, BoolArray, Executable, Float64Array, Limits, SamplingParams, StepResult

# Sequences that decode at once, and the length of their prompts.
_DECODES = (
    (1, 16),
    (1, 512),
    (1, 2048),
    (2, 256),
    (4, 512),
    (8, 32),
    (8, 256),
    (16, 192),
    (32, 96),
    (64, 48),
)
_DECODE_STEPS = 12
_PROMPTS = (8, 16, 32, 64, 128, 192, 256, 384, 512, 1024)
_PROMPT_ROUNDS = 4
_MIX_REQUESTS = 80
_MIX_MOST_TOKENS = 64  # of a completion: more prompts beside decodes in the same time
_MIX_SEQUENCES = (4, 12, 32, 64)
_OUTLIER_DEVIATIONS = 6.0  # beyond, something else had the machine
_ROUNDS = 12
_SLOW_WEIGHT = 0.03  # others' work on the machine only adds time
_SWAP_BLOCKS = 64
_SWAP_ROUNDS = 5
_SLOW_SHARE = 4  # blocks of the slow tier a block of the fast one
_KV_TOKENS = 131_072  # of the machine that is simulated, whatever was free when it was measured


@dataclass(frozen=True, slots=True)
class Fit:
    """How well the coefficients explain the steps."""

    num_steps: int
    num_outliers: int
    median_error: float  # of |predicted / measured - 1|
    p90_error: float
    total_error: float  # of the sum of all steps: predicted / measured - 1
    block_bytes: int
    swap_bytes_per_second: float


class StepRecorder:
    """An executable that notes what its last batch was made of, in the order of _COEFFICIENTS."""

    def __init__(self, executable: Executable) -> None:
        self._executable = executable
        self.features: tuple[int, ...] = ()

    @property
    def limits(self) -> Limits:
        return self._executable.limits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executable, name)

    def run(self, batch: Batch) -> StepResult:
        self.features = features_of(batch)
        return self._executable.run(batch)


_COEFFICIENTS = (
    "fixed_seconds",
    "prefill_seconds",
    "decode_seconds",
    "prefill_attended_seconds",
    "decode_attended_seconds",
)


def features_of(batch: Batch) -> tuple[int, ...]:
    """What a step's seconds are linear in; a sequence's only row counts as a decode."""
    rows = np.diff(batch.sequence_starts).astype(np.int64)
    ends = batch.context_lengths.astype(np.int64)
    is_decode = (rows == 1) & (ends > 1)
    attended = rows * (ends - rows) + rows * (rows + 1) // 2
    return (
        1,
        int(rows[~is_decode].sum()),
        int(is_decode.sum()),
        int(attended[~is_decode].sum()),
        int(attended[is_decode].sum()),
    )


def fit_machine(model: LoadedModel, options: EngineOptions, *, name: str) -> tuple[SimulatedMachine, Fit]:
    """Run steps of many kinds through the engine, its scheduling and text included, and fit their cost.

    Raises:
        MeasurementError: the steps do not make sense.
    """
    executable = model.executable
    features, seconds = measure_steps(model)
    cost, kept = fit_cost(features, seconds, slow_weight=_SLOW_WEIGHT)
    swap_seconds = measure_swap(executable)
    predicted = _predict(cost, features[kept])
    errors = np.abs(predicted / seconds[kept] - 1)
    machine = SimulatedMachine(
        name=name,
        source=f"fastserve bench fit-cost: {len(seconds)} steps of {name}, weights {model.weights}, "
        f"KV {options.kv_dtype}",
        cost=cost,
        max_tokens=executable.limits.max_tokens,
        max_sequences=min(executable.limits.max_sequences, executable.limits.max_outputs),
        block_size=executable.block_size,
        num_blocks=_KV_TOKENS // executable.block_size,
        num_slow_blocks=_SLOW_SHARE * _KV_TOKENS // executable.block_size,
        swap_seconds_per_block=swap_seconds,
        is_swap_duplex=False,  # one I/O thread
    )
    return machine, Fit(
        num_steps=len(seconds),
        num_outliers=int((~kept).sum()),
        median_error=float(np.median(errors)),
        p90_error=float(np.percentile(errors, 90)),
        total_error=float(predicted.sum() / seconds[kept].sum() - 1),
        block_bytes=executable.block_bytes,
        swap_bytes_per_second=executable.block_bytes / swap_seconds,
    )


def measure_steps(model: LoadedModel) -> tuple[Float64Array, Float64Array]:
    """Features [steps, 5] and seconds [steps] of real steps: decodes alone, prompts alone, and both."""
    recorder = StepRecorder(model.executable)
    engine = Engine(
        recorder,
        eos_token_ids=(),
        make_decoder=model.tokenizer.stream_decoder,
        context_length=model.context_length,
        options=ScheduleOptions(policy="fcfs", prefix_cache="off"),
    )
    steps: list[tuple[tuple[int, ...], float]] = []
    for requests in _scenarios(model):
        pending = list(requests.arrivals)
        num_live = 0
        while pending or engine.has_work:
            while pending and num_live < requests.most_at_once:
                arrival = pending.pop()
                prompt = make_prompts(1, arrival.prompt_tokens, model.executable.vocab_size)[0]
                engine.add(prompt, SamplingParams(max_tokens=arrival.completion_tokens, ignore_eos=True))
                num_live += 1
            started = time.perf_counter()
            chunks = engine.step()
            steps.append((recorder.features, time.perf_counter() - started))
            num_live -= sum(chunk.completion is not None for chunk in chunks)
    return np.array([features for features, _ in steps], np.float64), np.array([s for _, s in steps])


@dataclass(frozen=True, slots=True)
class _Scenario:
    arrivals: tuple[Arrival, ...]
    most_at_once: int


def _scenarios(model: LoadedModel) -> Iterator[_Scenario]:
    """The first is a warm-up, and measured like the others: outliers are left out."""
    limits = model.executable.limits
    most = min(limits.max_sequences, limits.max_outputs)
    kv_tokens = limits.num_blocks * model.executable.block_size
    room = min(kv_tokens, model.context_length)
    for num_sequences, prompt_tokens in _DECODES:
        length = prompt_tokens + _DECODE_STEPS
        if num_sequences <= most and length <= room and num_sequences * length <= kv_tokens:
            yield _Scenario((_request(prompt_tokens, _DECODE_STEPS),) * num_sequences, num_sequences)
    yield _Scenario(tuple(_request(n, 1) for n in _PROMPTS * _PROMPT_ROUNDS if n < room), 1)
    requests = short_chat().arrivals(_MIX_REQUESTS, 0)
    for num_sequences in _MIX_SEQUENCES:
        part = requests[:: len(_MIX_SEQUENCES)]
        yield _Scenario(
            tuple(_request(r.prompt_tokens, min(r.completion_tokens, _MIX_MOST_TOKENS)) for r in part),
            min(num_sequences, most),
        )


def _request(prompt_tokens: int, completion_tokens: int) -> Arrival:
    return Arrival(arrival_seconds=0.0, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)


def fit_cost(
    features: Float64Array, seconds: Float64Array, *, slow_weight: float = 0.5, is_relative: bool = True
) -> tuple[SimulatedCost, BoolArray]:
    """Least squares of the errors with no coefficient below zero, outliers left out. Returns the cost and
    which steps were kept, [steps].

    Args:
        slow_weight: of a step that took longer than predicted, against 1 - slow_weight of the others
            (expectile regression, Newey and Powell, Econometrica 55, 1987): 0.5 is the mean; below it, the
            fit leans to the fast steps, which had the machine to themselves.
        is_relative: errors are shares of a step's seconds, so that short steps count as much as long ones;
            else they are seconds, which is what requests are delayed by.

    Raises:
        MeasurementError: too few steps.
    """
    if len(seconds) < 4 * features.shape[1]:
        raise MeasurementError(
            f"{len(seconds)} steps are too few to fit", hint="give the model larger limits"
        )
    kept = np.ones(len(seconds), np.bool_)
    step_weights = np.ones(len(seconds))
    for _ in range(_ROUNDS):
        scale = seconds[kept] if is_relative else np.full(int(kept.sum()), seconds[kept].mean())
        coefficients = _solve(features[kept], seconds[kept], step_weights[kept], scale)
        errors = features @ coefficients / seconds - 1
        step_weights = np.where(errors < 0, slow_weight, 1 - slow_weight)
        spread = np.median(np.abs(errors - np.median(errors)))
        kept = np.abs(errors - np.median(errors)) <= _OUTLIER_DEVIATIONS * max(spread, 0.01)
    return SimulatedCost(**dict(zip(_COEFFICIENTS, coefficients.tolist(), strict=True))), kept


def _solve(
    features: Float64Array, seconds: Float64Array, weights: Float64Array, scale: Float64Array
) -> Float64Array:
    roots = np.sqrt(weights) / scale
    scaled = features * roots[:, None]
    used = np.arange(features.shape[1])
    while True:
        solution, *_ = np.linalg.lstsq(scaled[:, used], seconds * roots, rcond=None)
        if (solution >= 0).all():
            coefficients = np.zeros(features.shape[1])
            coefficients[used] = solution
            return coefficients
        used = used[solution >= 0]


def _predict(cost: SimulatedCost, features: Float64Array) -> Float64Array:
    coefficients = asdict(cost)
    predicted: Float64Array = features @ np.array([coefficients[name] for name in _COEFFICIENTS])
    return predicted


def measure_swap(executable: Executable) -> float:
    """Seconds to move a KV block to a spill file or back, as the engine's own mover has measured it."""
    num_blocks = min(_SWAP_BLOCKS, executable.limits.num_blocks)
    tier = SpillFile(num_blocks=num_blocks, block_bytes=executable.block_bytes)
    mover = ThreadMover(executable, tier)
    pairs = tuple((block, block) for block in range(num_blocks))
    try:
        for _ in range(_SWAP_ROUNDS):
            for direction in get_args(Direction):
                mover.submit(Move(0, direction, pairs))
                while not mover.poll():
                    mover.wait(1.0)
        return mover.seconds_per_block()
    finally:
        mover.close()


def to_json(machine: SimulatedMachine, fit: Fit) -> dict[str, Any]:
    """What `load_machine` reads, with how well it fits."""
    return {**machine.to_json(), "fit": asdict(fit)}
