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
from fastserve.compress.model_kind import writes_text
from fastserve.engine.load import model_context
from fastserve.evaluate.worker import FASTSERVE, Worker
from fastserve.evaluate.workload import Decode, Prefill, Sentences
from fastserve.models.family import read_config
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
    subjects = {name: _Subject.of(path) for name, path in models.items()}
    with ExitStack() as stack:
        workers = {}
        for name, path in models.items():
            worker = Worker(FASTSERVE, Path(sys.executable), variables=_WITHOUT_CACHE)
            workers[name] = stack.enter_context(worker)
            workers[name].open(subjects[name].job(path, threads))
        found: dict[str, dict[str, list[float]]] = {name: {} for name in models}
        for turn in range(turns + 1):  # the first warms up
            for name in list(models)[:: -1 if turn % 2 else 1]:
                time.sleep(_SETTLE_SECONDS)
                for figure, value in subjects[name].run(workers[name]).items():
                    found[name].setdefault(figure, []).append(value)
            progress("speed", turn + 1, turns + 1)
        memory = {name: worker.peak_memory_bytes() for name, worker in workers.items()}
    return {
        name: Speed(
            memory_bytes=memory[name],
            prefill_tokens=subjects[name].length if "prefill_ms" in figures else None,
            sentence_tokens=subjects[name].length if "sentence_ms" in figures else None,
            **{figure: statistics.median(values[1:]) for figure, values in figures.items()},
        )
        for name, figures in found.items()
    }


@dataclass(frozen=True, slots=True)
class _Subject:
    """What is timed of a model: `length` tokens of a prompt or text, and those that are decoded, as far as
    the context holds them."""

    writes: bool
    vocab_size: int
    context: int

    @classmethod
    def of(cls, path: Path) -> _Subject:
        checkpoint = open_checkpoint(path)
        config = read_config(checkpoint.config)
        return cls(writes_text(checkpoint), config.vocab_size, model_context(checkpoint, config))

    @property
    def length(self) -> int:
        if self.writes:
            return min(_PREFILL_TOKENS, self.context - 2)
        return min(_SENTENCE_TOKENS, self.context)

    @property
    def decoded(self) -> int:
        return min(_DECODE_TOKENS, max((self.context - 17) // 2, 1))

    def job(self, path: Path, threads: int | None) -> JsonObject:
        return {
            "model": str(path),
            "task": "generate" if self.writes else "embed",
            "weights": "auto",
            "threads": threads,
            "context_length": min(2 * _PREFILL_TOKENS, self.context),
            "max_sequences": 1 if self.writes else 32,
        }

    def run(self, worker: Worker) -> dict[str, float]:
        if self.writes:
            return {
                "prefill_ms": 1000 * self.length / Prefill(self.length).run(worker, self.vocab_size),
                "decode_ms": 1000 / Decode(1, self.decoded).run(worker, self.vocab_size),
            }
        return {
            "sentence_ms": 1000 / Sentences((self.length,)).run(worker, self.vocab_size),
            "sentences_per_second": Sentences((self.length,) * 32).run(worker, self.vocab_size),
        }
