"""How fast models are, and how much memory they take: in processes of their own, in turns."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.engine.load import model_context
from fastserve.evaluate.worker import FASTSERVE, Worker
from fastserve.evaluate.workload import Decode, Prefill, Sentences
from fastserve.models.config import DecoderConfig
from fastserve.models.family import ModelConfig, read_config
from fastserve.types import JsonObject

TURNS = 3
_PREFILL_TOKENS = 128
_DECODE_TOKENS = 64
_SENTENCE_TOKENS = 64
_WITHOUT_CACHE = {"FASTSERVE_PACKED_CACHE": "0"}  # a model that has yet to get its name is packed once
_SETTLE_SECONDS = 0.1  # before every run: threads of the process before spin for a while


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Medians over turns.

    Attributes:
        decode_ms: of a token after the first, one sequence alone; None of encoders.
        prefill_ms: of a prompt of `prefill_tokens` up to its first token; None of encoders.
        sentence_ms: of one text of `sentence_tokens`; None of decoders.
        sentences_per_second: of 32 texts of such a length at once; None of decoders.
        memory_bytes: most that the process had, keys and values of the context of these runs included.
    """

    memory_bytes: int
    decode_ms: float | None = None
    prefill_ms: float | None = None
    prefill_tokens: int | None = None
    sentence_ms: float | None = None
    sentence_tokens: int | None = None
    sentences_per_second: float | None = None

    def to_json(self) -> JsonObject:
        return {name: value for name, value in asdict(self).items() if value is not None}


def measure_speeds(
    models: Mapping[str, Path],
    *,
    threads: int | None = None,
    turns: int | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Speed]:
    """The speed of models by name, each run as it is served by default, in turns: what else the machine does
    meets all of them alike.

    Raises:
        MeasurementError: a process failed.
        CheckpointError, UnsupportedError: a model cannot be read.
    """
    turns = turns or TURNS
    configs = {name: _config(path) for name, path in models.items()}
    with ExitStack() as stack:
        workers = {}
        for name, path in models.items():
            worker = Worker(FASTSERVE, Path(sys.executable), variables=_WITHOUT_CACHE)
            workers[name] = stack.enter_context(worker)
            workers[name].open(_job(path, configs[name], threads))
        found: dict[str, dict[str, list[float]]] = {name: {} for name in models}
        for turn in range(turns + 1):  # the first warms up
            for name in list(models)[:: -1 if turn % 2 else 1]:
                time.sleep(_SETTLE_SECONDS)
                for figure, value in _run(workers[name], configs[name]).items():
                    found[name].setdefault(figure, []).append(value)
            progress("speed", turn + 1, turns + 1)
        memory = {name: worker.peak_memory_bytes() for name, worker in workers.items()}
    return {
        name: Speed(
            memory_bytes=memory[name],
            prefill_tokens=_lengths(configs[name])[0] if "prefill_ms" in figures else None,
            sentence_tokens=_lengths(configs[name])[0] if "sentence_ms" in figures else None,
            **{figure: statistics.median(values[1:]) for figure, values in figures.items()},
        )
        for name, figures in found.items()
    }


def _config(path: Path) -> tuple[ModelConfig, int]:
    checkpoint = open_checkpoint(path)
    config = read_config(checkpoint.config)
    return config, model_context(checkpoint, config)


def _lengths(config: tuple[ModelConfig, int]) -> tuple[int, int]:
    """Tokens of a prompt or text, and those that are decoded, as far as the context holds them."""
    kind, context = config
    if not isinstance(kind, DecoderConfig):
        return min(_SENTENCE_TOKENS, context), 0
    decoded = min(_DECODE_TOKENS, max((context - 17) // 2, 1))
    return min(_PREFILL_TOKENS, context - 2), decoded


def _job(path: Path, config: tuple[ModelConfig, int], threads: int | None) -> JsonObject:
    kind, context = config
    is_decoder = isinstance(kind, DecoderConfig)
    return {
        "model": str(path),
        "task": "generate" if is_decoder else "embed",
        "weights": "auto",
        "threads": threads,
        "context_length": min(2 * _PREFILL_TOKENS, context),
        "max_sequences": 1 if is_decoder else 32,
    }


def _run(worker: Worker, config: tuple[ModelConfig, int]) -> dict[str, float]:
    kind, _ = config
    length, decoded = _lengths(config)
    if isinstance(kind, DecoderConfig):
        return {
            "prefill_ms": 1000 * length / Prefill(length).run(worker, kind.vocab_size),
            "decode_ms": 1000 / Decode(1, decoded).run(worker, kind.vocab_size),
        }
    return {
        "sentence_ms": 1000 / Sentences((length,)).run(worker, kind.vocab_size),
        "sentences_per_second": Sentences((length,) * 32).run(worker, kind.vocab_size),
    }
