"""How fast a whole model is: ours alone, or interleaved with peers in one run."""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastserve.backends.native.executable import CallProfile
from fastserve.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastserve.config import EngineOptions
from fastserve.engine.blueprint import model_context
from fastserve.errors import MeasurementError, OptionError, UnsupportedError
from fastserve.evaluate.estimate import Estimate, estimate_ratio
from fastserve.evaluate.machine import MachineLimits, check_share, measure_limits
from fastserve.evaluate.peer_model import peer_job
from fastserve.evaluate.profile import LINEARS, OpProfile, group_calls
from fastserve.evaluate.worker import FASTSERVE, PEERS, EngineKind, Prompts, Task, Worker
from fastserve.evaluate.workload import (
    DECODER_MEASURES,
    ENCODER_MEASURES,
    Decode,
    Measure,
    Prefill,
    Sentences,
    make_prompts,
)
from fastserve.models.config import DecoderConfig, EncoderDecoderConfig
from fastserve.models.family import ModelConfig, read_config

logger = logging.getLogger(__name__)

MAX_CONTEXT = 2048 + 64
KV_TOKENS = 2048  # in the start whose memory is measured
_START_PROMPT_TOKENS = 16
_START_SECONDS = 20.0  # slow starts are measured once, after the first that fills the caches
_NUM_STARTS = 3
_COMPARED_TEXTS = 8
_SETTLE_SECONDS = 0.25  # before every run: OpenMP's threads of the engine before spin for up to 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedOptions:
    """How to measure. `weights`, `threads` and those of memory, which peers do not get, are options of the
    engine; `peers` are interpreters by name.

    Raises:
        OptionError: from `choose_measures`, where `only` names no measure of the model.
    """

    weights: str = "auto"
    threads: int | None = None
    kv_memory: int | str | None = None
    kv_spill: int | str | None = None
    spill_dir: str | Path | None = None
    pairs: int = 7
    only: Sequence[str] = ()
    peers: Mapping[str, Path] = field(default_factory=dict)
    is_profiled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A start of an engine from nothing but files in the page cache."""

    first_token_seconds: float  # from the start of the process
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpeed:
    """What was measured of one engine. `rates` holds every run, in order, by measure."""

    version: str
    weights: str
    rates: Mapping[str, Sequence[float]]
    start: Start
    cosine: float | None = None  # of a peer's embeddings with ours, the mean over a batch

    def median(self, name: str) -> float:
        return statistics.median(self.rates[name])

    def token_rates(self) -> dict[str, float]:
        """Of measures in sentences, the tokens that they are; padding does not count."""
        return {
            name.replace("sentences", "tokens"): self.median(name) * statistics.mean(measure.lengths)
            for name, measure in ENCODER_MEASURES.items()
            if isinstance(measure, Sentences) and name in self.rates
        }

    def to_json(self) -> dict[str, Any]:
        """The figures, one a measure."""
        return {
            **{name: self.median(name) for name in self.rates},
            **self.token_rates(),
            "start_to_first_token_seconds": self.start.first_token_seconds,
            "peak_memory_bytes": self.start.peak_memory_bytes,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpeed:
    """The result of `measure_model`. Measures that need a longer context than the model's are left out."""

    model: str
    options: SpeedOptions
    limits: MachineLimits
    ours: EngineSpeed
    peers: Mapping[str, EngineSpeed]
    left_out: Mapping[str, str]  # peers that were asked for, and why they did not run
    shares: Mapping[str, float]
    profile: Sequence[OpProfile]

    def ratios(self, peer: str) -> dict[str, Estimate]:
        """Of each measure, how many times faster we are than a peer, within pairs."""
        theirs = self.peers[peer].rates
        return {name: estimate_ratio(self.ours.rates[name], theirs[name]) for name in theirs}

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "weights": self.options.weights,
            "threads": self.limits.threads,
            **self.ours.to_json(),
            **self.shares,
            "version": self.ours.version,
            "runs": self.ours.rates,
            "left_out": self.left_out,
            "limits": self.limits.to_json(),
            "peers": {
                name: {
                    **speed.to_json(),
                    "version": speed.version,
                    "weights": speed.weights,
                    "cosine": speed.cosine,
                    "runs": speed.rates,
                    "ratios": {measure: asdict(ratio) for measure, ratio in self.ratios(name).items()},
                }
                for name, speed in self.peers.items()
            },
            "profile": [asdict(profile) for profile in self.profile],
        }


def measure_model(path: Path, options: SpeedOptions, *, name: str | None = None) -> ModelSpeed:
    """Measure a model in fresh processes: starts one after the other, then all engines side by side, each
    figure in turns of one run an engine. `name` is what the result calls the model.

    Raises:
        OptionError: an option is out of range, or names what there is not.
        MeasurementError: our engine failed, a peer failed that had started well, or a share of the machine's
            limits came out above 1. A peer that does not start is left out, with a warning.
        CheckpointError, UnsupportedError: the model cannot be read.
    """
    checkpoint = open_checkpoint(path)
    config = read_config(checkpoint.config)
    if isinstance(config, EncoderDecoderConfig):
        raise UnsupportedError(
            f"the model {str(checkpoint.path)!r} is an encoder-decoder, whose speed is not measured",
            hint="choose a decoder or an encoder",
        )
    config = replace(config, max_context=model_context(checkpoint, config))
    measures = choose_measures(config, options.only)
    peers, left_out = choose_peers(options.peers, _task(config))
    options = replace(options, peers=peers)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        jobs, starts = {}, {}
        for engine in (FASTSERVE.name, *peers):
            try:
                jobs[engine] = _make_job(engine, checkpoint, config, options, folder)
                starts[engine] = measure_start(*jobs[engine], config)
            except MeasurementError as error:
                if engine == FASTSERVE.name:
                    raise
                jobs.pop(engine, None)
                left_out[engine] = f"failed: {error.message}"
                logger.warning("%s is left out: it %s", engine, left_out[engine])
        workers, opened = {}, {}
        for engine, (kind, python, job) in jobs.items():
            workers[engine] = stack.enter_context(Worker(kind, python))
            opened[engine] = workers[engine].open(job)
        cosines = {} if isinstance(config, DecoderConfig) else _compare_embeddings(workers, config)
        cost = _Cost(workers[FASTSERVE.name], config)
        limits = measure_limits(options.threads, working_set_bytes=cost.working_set_bytes)
        rates: dict[str, dict[str, list[float]]] = {engine: {} for engine in workers}
        for measure_name, measure in measures.items():
            for worker in workers.values():  # warms up
                measure.run(worker, config.vocab_size)
            for index in range(options.pairs):
                for engine in list(workers)[:: -1 if index % 2 else 1]:
                    time.sleep(_SETTLE_SECONDS)
                    rate = measure.run(workers[engine], config.vocab_size)
                    rates[engine].setdefault(measure_name, []).append(rate)
            limits = limits.at_least(
                measure_limits(options.threads, working_set_bytes=cost.working_set_bytes, seconds=0.2)
            )
        profile = cost.profile(measures) if options.is_profiled else []
    speeds = {
        engine: EngineSpeed(
            version=opened[engine].version,
            weights=opened[engine].weights,
            rates=rates[engine],
            start=starts[engine],
            cosine=cosines.get(engine),
        )
        for engine in rates
    }
    ours = speeds.pop(FASTSERVE.name)
    return ModelSpeed(
        model=name or path.name,
        options=options,
        limits=limits,
        ours=ours,
        peers=speeds,
        left_out=left_out,
        shares=cost.shares(ours, limits),
        profile=profile,
    )


def choose_measures(config: ModelConfig, only: Sequence[str]) -> dict[str, Measure]:
    """The measures that the model's context holds: all, or those whose names begin with one of `only`.

    Raises:
        OptionError: one of `only` begins none.
    """
    known = DECODER_MEASURES if isinstance(config, DecoderConfig) else ENCODER_MEASURES
    for prefix in only:
        if not any(name.startswith(prefix) for name in known):
            raise OptionError(f"no measure is named {prefix!r}", hint=f"choose among {', '.join(known)}")
    return {
        name: measure
        for name, measure in known.items()
        if measure.context_tokens <= config.max_context and (not only or name.startswith(tuple(only)))
    }


def choose_peers(peers: Mapping[str, Path], task: Task) -> tuple[dict[str, Path], dict[str, str]]:
    """The peers that do the model's task, and why the others are left out.

    Raises:
        OptionError: there are peers, and none does.
    """
    able = {name: python for name, python in peers.items() if task in PEERS[name].tasks}
    left_out = {name: f"is not compared on models that {task}" for name in peers if name not in able}
    if left_out and not able:
        choices = ", ".join(name for name, kind in PEERS.items() if task in kind.tasks)
        raise OptionError(
            f"{' and '.join(left_out)} cannot be compared on models that {task}",
            hint=f"choose among {choices}",
        )
    return able, left_out


def _task(config: ModelConfig) -> Task:
    return "generate" if isinstance(config, DecoderConfig) else "embed"


def _compare_embeddings(workers: Mapping[str, Worker], config: ModelConfig) -> dict[str, float]:
    """Of every peer, the mean cosine of its embeddings with ours: near 1 where it runs the same model."""
    texts = make_prompts(_COMPARED_TEXTS, _START_PROMPT_TOKENS, config.vocab_size)
    embeddings = {name: worker.embeddings(texts) for name, worker in workers.items()}
    units = {name: x / np.linalg.norm(x, axis=1, keepdims=True) for name, x in embeddings.items()}
    ours = units.pop(FASTSERVE.name)
    return {name: float((theirs * ours).sum(axis=1).mean()) for name, theirs in units.items()}


def measure_start(kind: EngineKind, python: Path, job: Mapping[str, Any], config: ModelConfig) -> Start:
    """The median of several starts after one that fills the caches, and the memory of the last with as many
    tokens of keys and values as KV_TOKENS, or as the model's context holds."""
    context = min(KV_TOKENS, config.max_context)
    job = {**job, "context_length": context, "max_sequences": 1}
    seconds: list[float] = []
    spent = 0.0
    while len(seconds) < 1 + _NUM_STARTS and (len(seconds) < 2 or spent < _START_SECONDS):
        begin = time.perf_counter()
        with Worker(kind, python) as worker:
            worker.open(job)
            _run_tokens(worker, config, min(_START_PROMPT_TOKENS, context - 1))
            seconds.append(time.perf_counter() - begin)
            _run_tokens(worker, config, context - 1)
            peak_memory_bytes = worker.peak_memory_bytes()
        spent += seconds[-1]
    return Start(first_token_seconds=statistics.median(seconds[1:]), peak_memory_bytes=peak_memory_bytes)


def _run_tokens(worker: Worker, config: ModelConfig, num_tokens: int) -> None:
    prompts = make_prompts(1, num_tokens, config.vocab_size)
    if isinstance(config, DecoderConfig):
        worker.generate(prompts, 1)
    else:
        worker.embed(prompts)


class _Cost:
    """What a model's steps have to do at the least, by the profile of our own engine."""

    def __init__(self, worker: Worker, config: ModelConfig) -> None:
        self._worker = worker
        self._config = config
        self._decode_bytes = self._prefill_operations = 0.0
        if isinstance(config, DecoderConfig):
            self._decode_bytes = self._measure_decode_bytes()
            if config.max_context > 512:
                self._prefill_operations = self._measure_prefill_operations()

    @property
    def working_set_bytes(self) -> int:
        """What a decoding step reads; for an encoder, what one sentence reads."""
        if self._decode_bytes:
            return int(self._decode_bytes)
        prompts = make_prompts(1, _START_PROMPT_TOKENS, self._config.vocab_size)
        return int(sum(call.bytes for call in self._calls(prompts, 0) if call.op in LINEARS))

    def shares(self, ours: EngineSpeed, limits: MachineLimits) -> dict[str, float]:
        """Raises MeasurementError where one is above 1."""
        shares = {}
        if "decode_1_tokens_per_second" in ours.rates:
            rate = ours.median("decode_1_tokens_per_second") * self._decode_bytes
            shares["decode_1_share_of_bandwidth"] = rate / limits.read_bytes_per_second
        if "prefill_512_tokens_per_second" in ours.rates:
            rate = ours.median("prefill_512_tokens_per_second") * self._prefill_operations
            shares["prefill_512_share_of_int8_peak"] = rate / limits.int8_operations_per_second
        return {name: check_share(name, share) for name, share in shares.items()}

    def profile(self, measures: Mapping[str, Measure]) -> list[OpProfile]:
        """Of one prompt of 512 tokens, or as many as the context holds, and 64 tokens after it."""
        length = min(512, self._config.max_context - 64)
        max_tokens = 64 if isinstance(self._config, DecoderConfig) else 0
        return group_calls(self._calls(make_prompts(1, length, self._config.vocab_size), max_tokens))

    def _measure_decode_bytes(self) -> float:
        """Bytes of weights, keys and values that a token of `decode_1` reads."""
        decode = DECODER_MEASURES["decode_1_tokens_per_second"]
        assert isinstance(decode, Decode)
        prompts = decode.prompts(self._config.vocab_size)
        short, long = (self._bytes_read(prompts, max_tokens) for max_tokens in decode.calls)
        return (long - short) / decode.num_tokens

    def _measure_prefill_operations(self) -> float:
        """Operations of the linears, a token of `prefill_512`."""
        prefill = DECODER_MEASURES["prefill_512_tokens_per_second"]
        assert isinstance(prefill, Prefill)
        prompts = make_prompts(1, prefill.num_tokens, self._config.vocab_size)
        calls = self._calls(prompts, 1)
        return sum(call.operations for call in calls if call.op in LINEARS) / prefill.num_tokens

    def _bytes_read(self, prompts: Prompts, max_tokens: int) -> int:
        """Of weights, keys and values."""
        calls = self._calls(prompts, max_tokens)
        return sum(call.bytes for call in calls if call.op in (*LINEARS, "attention"))

    def _calls(self, prompts: Prompts, max_tokens: int) -> list[CallProfile]:
        return [CallProfile(**call) for call in self._worker.cost(prompts, max_tokens)]


def _make_job(
    name: str, checkpoint: Checkpoint, config: ModelConfig, options: SpeedOptions, folder: Path
) -> tuple[EngineKind, Path, dict[str, Any]]:
    """An engine to measure: what runs it and what it is to open."""
    memory = {"kv_memory": options.kv_memory, "kv_spill": options.kv_spill, "spill_dir": options.spill_dir}
    EngineOptions(weights=options.weights, threads=options.threads, **memory)  # type: ignore[arg-type]  # checked there
    job = {
        "model": str(checkpoint.path),
        "task": _task(config),
        "weights": options.weights,
        "threads": options.threads,
        **memory,
        "spill_dir": None if options.spill_dir is None else str(options.spill_dir),
        "context_length": min(MAX_CONTEXT, config.max_context),
        "max_sequences": 64,
    }
    if name == FASTSERVE.name:
        return FASTSERVE, Path(sys.executable), job
    python = options.peers[name]
    return PEERS[name], python, peer_job(PEERS[name], python, checkpoint, job, folder)
