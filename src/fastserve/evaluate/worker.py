"""Measured processes: each engine runs in one of its own, so that its memory and its start are its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from fastserve.errors import MeasurementError, OptionError
from fastserve.types import Float32Array

Prompts = Sequence[Sequence[int]]
Task = Literal["generate", "embed"]

_SCRIPT = Path(__file__).resolve().parent / "peers" / "worker.py"
_SHOWN_ERROR_CHARACTERS = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKind:
    """An engine that can be measured: the module of `peers` that runs it, what that imports, and the form of
    model that it opens: `w8a8` is a folder with int8 weights in the compressed-tensors schema where int8 is
    asked for, else a plain one."""

    name: str
    module: str
    needs: str
    form: Literal["any", "folder", "gguf", "w8a8"]
    prepares: bool = False
    tasks: frozenset[Task] = frozenset({"generate"})


FASTSERVE = EngineKind(
    name="fastserve",
    module="engine_fastserve",
    needs="fastserve",
    form="any",
    tasks=frozenset({"generate", "embed"}),
)
PEERS: Mapping[str, EngineKind] = {
    kind.name: kind
    for kind in (
        EngineKind(
            name="llama.cpp", module="engine_llama_cpp", needs="llama_cpp", form="gguf", prepares=True
        ),
        EngineKind(
            name="openvino", module="engine_openvino", needs="openvino_genai", form="folder", prepares=True
        ),
        EngineKind(
            name="transformers",
            module="engine_transformers",
            needs="transformers",
            form="folder",
            tasks=frozenset({"generate", "embed"}),
        ),
        EngineKind(name="vllm", module="engine_vllm", needs="vllm", form="w8a8"),
        EngineKind(
            name="onnxruntime",
            module="engine_onnxruntime",
            needs="onnxruntime",
            form="folder",
            prepares=True,
            tasks=frozenset({"embed"}),
        ),
    )
}


def find_peers(names: Sequence[str], interpreters: Sequence[Path]) -> dict[str, Path]:
    """The interpreter that has each of these peers: the first of `interpreters`, by default this one.

    Raises:
        OptionError: a name is unknown, or no interpreter can import the peer.
    """
    found = {}
    for name in names:
        if name not in PEERS:
            raise OptionError(f"no peer is named {name!r}", hint=f"choose among {', '.join(PEERS)}")
        candidates = interpreters or [Path(sys.executable)]
        searched = " and ".join(map(str, candidates))
        has_it = (python for python in candidates if _can_import(python, PEERS[name].needs))
        if (python := next(has_it, None)) is None:
            raise OptionError(
                f"{name} is not installed: {searched} cannot import {PEERS[name].needs}",
                hint="name the interpreter of an environment that has it with --peer-python",
            )
        found[name] = python
    return found


class Opened(NamedTuple):
    """What an engine says of itself once it has a model."""

    version: str
    weights: str  # the bits that it really keeps, in its own words


class Worker:
    """One measured process, started when made. Use it as a context: the process ends with it.

    Args:
        variables: of its environment, besides those of this process.

    Raises:
        MeasurementError: from every method, where the process failed or has ended.
    """

    def __init__(self, kind: EngineKind, python: Path, *, variables: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= variables or {}
        if kind is FASTSERVE:  # wherever this one runs from
            environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
        self._process = subprocess.Popen(
            [python, _SCRIPT, kind.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        with self._process:  # closes the pipes, so that it ends, and waits
            pass
        self._errors.close()

    def prepare(self, job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """The job with what the engine changed of it; files that it made for that lie in `folder`."""
        return {**job, **self._request("prepare", job=job, folder=str(folder))["job"]}

    def open(self, job: Mapping[str, Any]) -> Opened:
        """Load the model."""
        return Opened(**self._request("open", job=job))

    def generate(self, prompts: Prompts, max_tokens: int) -> float:
        """Seconds that greedy completions of exactly so many tokens take, all prompts at once."""
        answer = self._request("generate", prompts=prompts, max_tokens=max_tokens)
        lengths = {len(token_ids) for token_ids in answer["token_ids"]}
        if lengths != {max_tokens} or len(answer["token_ids"]) != len(prompts):
            raise MeasurementError(
                f"{self.kind.name} gave completions of {sorted(lengths)} tokens; {max_tokens} were asked for"
            )
        return float(answer["seconds"])

    def embed(self, texts: Prompts) -> float:
        """Seconds that the embeddings of texts take."""
        return float(self._request("embed", texts=texts)["seconds"])

    def embeddings(self, texts: Prompts) -> Float32Array:
        """The embeddings themselves [texts, width]."""
        return np.asarray(self._request("embed", texts=texts)["embeddings"], np.float32)

    def cost(self, prompts: Prompts, max_tokens: int) -> list[dict[str, Any]]:
        """Fields of every CallProfile of a run of our own engine; `max_tokens` 0 embeds."""
        calls = self._request("cost", prompts=prompts, max_tokens=max_tokens)["calls"]
        return [dict(call) for call in calls]

    def peak_memory_bytes(self) -> int:
        """Most memory that the process and those that it started had so far."""
        return int(self._request("memory")["peak_memory_bytes"])

    def _request(self, command: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # its answer is missing then, too
            print(json.dumps({"command": command, **arguments}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise self._failure(command)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failure(self, command: str) -> MeasurementError:
        exit_code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        how = f"by signal {-exit_code}" if exit_code < 0 else f"with exit code {exit_code}"
        last = lines[-1][:_SHOWN_ERROR_CHARACTERS] if lines else "it said nothing"
        return MeasurementError(f"{self.kind.name} ended {how} on {command!r}: {last}")


def _can_import(python: Path, module: str) -> bool:
    script = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
    try:
        result = subprocess.run([python, "-c", script, module], capture_output=True, check=False)
    except OSError as error:
        raise OptionError(
            f"{python} cannot be run: {error.strerror}", hint="name an interpreter with --peer-python"
        ) from error
    return result.returncode == 0
