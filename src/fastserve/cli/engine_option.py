"""Options of the commands that run a model, and how such a command opens it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from fastserve.config import Backend, EngineOptions, KvDtype, WeightsChoice
from fastserve.types import SamplingParams

if TYPE_CHECKING:
    from fastserve.engine.llm import LLM
    from fastserve.engine.load import Task

Command = Callable[..., None]
Decorator = Callable[[Command], Command]

model_argument = click.argument(
    "model",
    metavar="NAME_OR_DIR",
    help="A name that `fastserve models list` shows, a source such as hf:owner/name, a folder or a .gguf "
    "file. What is not here is downloaded.",
)

_DEFAULTS = EngineOptions()
_ENGINE_OPTIONS: Mapping[str, Decorator] = {
    "weights": click.option(
        "--weights",
        type=click.Choice(get_args(WeightsChoice)),
        default=_DEFAULTS.weights,
        help="Format of the weights in memory: f32 is exact, stored as the file has it, int4 the smallest; "
        "auto is int8 for text generation and f32 for encoders. gN are columns that share a scale.",
    ),
    "kv_dtype": click.option(
        "--kv-dtype",
        type=click.Choice(get_args(KvDtype)),
        default=_DEFAULTS.kv_dtype,
        help="Format in which past tokens are kept (their keys and values); f32 is exact and takes twice the "
        "memory.",
    ),
    "threads": click.option(
        "--threads",
        type=int,
        help="Threads to compute with; by default as many as there are cores for this process.",
    ),
    "context_length": click.option(
        "--context-length",
        type=int,
        help="Most tokens of prompt and completion together; by default what the model was made for, up to "
        "8192.",
    ),
    "kv_memory": click.option(
        "--kv-memory",
        help="Memory to keep past tokens in, such as 512MiB; by default a part of what is free.",
    ),
    "kv_spill": click.option(
        "--kv-spill",
        help="Slower memory, a temporary file on a disk, for past tokens of waiting requests, such as 1GiB; "
        "by default none.",
    ),
    "spill_dir": click.option(
        "--spill-dir",
        type=click.Path(path_type=Path),
        help="Folder of that file; by default the system's for temporary files, or /var/tmp where that one "
        "lies in memory.",
    ),
    "backend": click.option(
        "--backend",
        type=click.Choice(get_args(Backend)),
        default=_DEFAULTS.backend,
        help="What computes: native, or PyTorch where it is installed, slow and for comparison.",
    ),
}


def engine_options(*names: str) -> Decorator:
    """Give a command these options of EngineOptions; it gets them as `options`."""
    return _pack("options", EngineOptions, {name: _ENGINE_OPTIONS[name] for name in names})


def sampling_options(defaults: SamplingParams) -> Decorator:
    """Give a command the options of SamplingParams, with its own defaults; it gets them as `params`."""
    options: dict[str, Decorator] = {
        "max_tokens": click.option(
            "--max-tokens",
            type=int,
            default=defaults.max_tokens,
            help="Most tokens to generate; by default until the context is full.",
        ),
        "temperature": click.option(
            "--temperature",
            type=float,
            default=defaults.temperature,
            help="How freely tokens are chosen; 0 always takes the likeliest, 1 follows the model's "
            "probabilities.",
        ),
        "top_k": click.option(
            "--top-k",
            type=int,
            default=defaults.top_k,
            help="Choose among the K likeliest tokens; 0 is off.",
        ),
        "top_p": click.option(
            "--top-p",
            type=float,
            default=defaults.top_p,
            help="Choose among the likeliest tokens that sum to this probability; 1 is off.",
        ),
        "min_p": click.option(
            "--min-p",
            type=float,
            default=defaults.min_p,
            help="Leave out tokens less likely than this share of the likeliest; 0 is off.",
        ),
        "seed": click.option(
            "--seed",
            type=int,
            default=defaults.seed,
            help="Number that makes random choices repeatable; by default a new one every time.",
        ),
        "stop": click.option(
            "--stop",
            multiple=True,
            default=defaults.stop,
            help="Stop where the model would write this text; may be given several times.",
        ),
    }
    return _pack("params", SamplingParams, options)


def open_llm(model: str, options: EngineOptions, *, task: Task, offline: bool, show_progress: bool) -> LLM:
    """Load a model for a task, downloading it first where it is not here. Raises as LLM."""
    from fastserve.cli.progress_bar import download_progress
    from fastserve.engine.llm import LLM
    from fastserve.hub.resolve import resolve

    with download_progress(shown=show_progress) as progress:
        path = resolve(model, offline=offline, progress=progress)
    return LLM(path, name=model, task=task, **asdict(options))


def _pack(argument: str, make: Callable[..., object], options: Mapping[str, Decorator]) -> Decorator:
    """Give a command options, whose values it gets as one argument: what `make` makes of them."""

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**values: Any) -> None:
            packed = make(**{name: values.pop(name) for name in options})
            command(**{argument: packed}, **values)

        decorated: Command = run
        for option in reversed(list(options.values())):
            decorated = option(decorated)
        return decorated

    return decorate
