"""Options of the commands that run a model, and how such a command opens it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import click

from fastserve.config import EngineOptions, ScheduleOptions
from fastserve.types import EarlyStopping, SamplingParams

if TYPE_CHECKING:
    from fastserve.engine.llm import LLM
    from fastserve.models.task import Task

Command = Callable[..., None]
Decorator = Callable[[Command], Command]

model_argument = click.argument(
    "model",
    metavar="NAME_OR_DIR",
    help="A name that `fastserve models list` shows, a source such as hf:owner/name, a folder or a .gguf "
    "file. What is not here is downloaded.",
)

# What is to be said of a field; its flag, type and default are its own.
_ENGINE_HELP: Mapping[str, str] = {
    "weights": "Format of the weights in memory: f32 is exact, stored as the file has it, int4 the smallest; "
    "auto is int8 for text generation, f32 for encoders (stored for quantized ones). gN are columns that "
    "share a scale.",
    "kv_dtype": "Format in which past tokens are kept (their keys and values); f32 is exact and takes twice "
    "the memory.",
    "threads": "Threads to compute with; by default as many as there are cores for this process.",
    "context_length": "Most tokens of prompt and completion together; by default what the model was made "
    "for, up to 8192.",
    "kv_memory": "Memory to keep past tokens in, such as 512MiB; by default a part of what is free.",
    "kv_spill": "Slower memory, a temporary file on a disk, for past tokens of waiting requests, such as "
    "1GiB; by default none.",
    "spill_dir": "Folder of that file; by default the system's for temporary files, or /var/tmp where that "
    "one lies in memory.",
    "policy": "Who goes first when not all can run: boost, fcfs, priority, sjf, hrrn, gittins, mlfq or "
    "mlfq-published, each with its knobs, such as boost:strength=1.",
    "target_gap_seconds": "How long a step may take while streams run; by default it follows what their "
    "tokens take alone, and the prompts that wait.",
    "most_slack_seconds": "By how much a step may be longer where all streams have been ahead of that by so "
    "much.",
    "peak_quantile": "Let requests in when there is room for what all that run are expected to grow to, by "
    "this quantile of earlier lengths; 0 expects no growth.",
    "pause_budget_seconds": "How long a stream may be paused for others in all.",
    "first_token_seconds": "Requests whose first token cannot come so soon go behind those whose can; by "
    "default all are alike.",
    "fair_share": "Whether tenants share service fairly; in a simulation they are the kinds of requests that "
    "a trace or a mix has.",
    "speculation": "Guess tokens, from earlier places of a text or by a draft model, and verify several at "
    "once, where that is faster; the completions are the same.",
    "max_draft_tokens": "Most tokens to guess at once. Only with --speculation.",
    "prompt_lookup_min": "Tokens that must have occurred before for a guess. Only with --speculation "
    "prompt-lookup.",
    "prompt_lookup_max": "Up to so many tokens in common, the place with the most is taken. Only with "
    "--speculation prompt-lookup.",
    "draft_model": "Smaller model of the same vocabulary that guesses, named as the model is; by default the "
    "model itself, with the next two. Only with --speculation draft.",
    "draft_weights": "Format of its weights, as --weights. Only with --speculation draft.",
    "draft_layers": "Compute only so many of its layers. Only with --speculation draft.",
    "draft_kv_memory": "Memory to keep its past tokens in, such as 64MiB; by default a fourth of what the "
    "model has. Only with --speculation draft.",
    "adapters": "LoRA or DoRA adapter, a folder as peft saves it, loaded beside the model: requests choose "
    "it as MODEL:NAME. Where several models are served, write MODEL:NAME=DIR. May be given several times.",
    "max_adapters": "Most adapters that completions which run at once may have; requests for others wait. By "
    "default 4, or none where no adapter is named.",
    "max_adapter_rank": "Highest rank of an adapter.",
    "max_sequences": "Most completions that run at once.",
    "max_batch_tokens": "Most tokens of one step; by default 512, and 2048 of encoders.",
    "prefill_chunk_tokens": "Most tokens of one prompt in one step; by default as many as a step takes.",
    "prefix_cache": "Which beginnings of earlier prompts are forgotten first: the least recently or the "
    "least frequently used; off keeps none.",
    "share_prefixes": "Who finds them: requests of the same tenant, or all.",
    "tenant_weights": "Share of a tenant; who is not named has 1. May be given several times.",
    "unknown_tenants": "Whether tenants without a weight are admitted.",
    "priority_classes": "A class of requests, a better one first. May be given several times.",
    "default_class": "Class of requests that name none.",
    "max_waiting": "Most requests that wait for their first turn; more are refused.",
    "queue_timeout_ms": "How long a request may wait for its first turn; by default for ever.",
    "session_idle_seconds": "A session without requests for so long is forgotten.",
    "backend": "What computes: native, or PyTorch where it is installed, slow and for comparison.",
    "device": "Where PyTorch computes, such as cuda or mps; by default the CPU. Only with --backend torch.",
}
_SAMPLING_HELP: Mapping[str, str] = {
    "max_tokens": "Most tokens to generate; by default until the context is full.",
    "temperature": "How freely tokens are chosen; 0 always takes the likeliest, 1 follows the model's "
    "probabilities.",
    "top_k": "Choose among the K likeliest tokens; 0 is off.",
    "top_p": "Choose among the likeliest tokens that sum to this probability; 1 is off.",
    "min_p": "Leave out tokens less likely than this share of the likeliest; 0 is off.",
    "seed": "Number that makes random choices repeatable; by default a new one every time.",
    "stop": "Stop where the model would write this text; may be given several times.",
}
_SEARCH_HELP: Mapping[str, str] = {
    "num_beams": "Search for the likeliest text with so many beams; 1 takes token by token. By default what "
    "an encoder-decoder's own settings say, else 1.",
    "length_penalty": "Of a search: above 0 it favours long texts, below 0 short ones.",
    "early_stopping": "Of a search: whether it ends as soon as there are as many texts as beams; never goes "
    "on as long as a better one could come.",
}


def engine_options(*names: str, defaults: EngineOptions | None = None) -> Decorator:
    """Give a command these options of EngineOptions; it gets them as `options`."""
    return pack_options("options", defaults or EngineOptions(), {name: _ENGINE_HELP[name] for name in names})


def schedule_options(defaults: ScheduleOptions, *names: str) -> Decorator:
    """Give a command these options of ScheduleOptions, with its own defaults; it gets them as `options`."""
    return pack_options("options", defaults, {name: _ENGINE_HELP[name] for name in names})


def sampling_options(defaults: SamplingParams) -> Decorator:
    """Give a command the options of SamplingParams, with its own defaults; it gets them as `params`."""
    return pack_options("params", defaults, _SAMPLING_HELP)


def generation_options(defaults: SamplingParams) -> Decorator:
    """The same, and those of beam search."""
    return pack_options("params", defaults, {**_SAMPLING_HELP, **_SEARCH_HELP})


def open_llm(model: str, options: EngineOptions, *, task: Task, offline: bool, show_progress: bool) -> LLM:
    """Load a model for a task, downloading it first where it is not here. Raises as LLM."""
    from fastserve.cli.progress_bar import download_progress
    from fastserve.engine.llm import LLM
    from fastserve.hub.resolve import resolve

    with download_progress(shown=show_progress) as progress:
        path = resolve(model, offline=offline, progress=progress)
        if options.draft_model is not None:
            draft_path = resolve(options.draft_model, offline=offline, progress=progress)
            options = replace(options, draft_model=draft_path)
    return LLM(path, name=model, task=task, **asdict(options))


def pack_options(argument: str, defaults: object, helps: Mapping[str, str]) -> Decorator:
    """Give a command options named as the fields that `helps` explains; it gets them as one argument, an
    object of the class of `defaults`.
    """
    make: Callable[..., object] = type(defaults)
    kinds = get_type_hints(make)

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**values: Any) -> None:
            packed = make(**{name: values.pop(name) for name in helps})
            command(**{argument: packed}, **values)

        decorated: Command = run
        for name, text in reversed(list(helps.items())):
            decorated = _option(name, kinds[name], getattr(defaults, name), text)(decorated)
        return decorated

    return decorate


def _option(name: str, kind: Any, default: Any, text: str) -> Decorator:
    """The flag of a field: a choice for a Literal, repeatable for a sequence or a mapping, else of the
    plainest type."""
    flag = f"--{name.replace('_', '-')}"
    if name == "adapters":
        return click.option(
            "--adapter", name, multiple=True, metavar="NAME=DIR", callback=_to_folders, help=text
        )
    if kind == EarlyStopping:
        choices = click.Choice(tuple(_EARLY_STOPPING))
        return click.option(flag, type=choices, default="false", callback=_to_early_stopping, help=text)
    if kind is bool:
        return click.option(flag, is_flag=True, default=default, help=text)
    if any(get_origin(kind_) is Mapping for kind_ in (kind, *get_args(kind))):
        return click.option(flag, multiple=True, metavar="NAME=NUMBER", callback=_to_mapping, help=text)
    if get_origin(kind) is Literal:
        return click.option(flag, type=click.Choice(get_args(kind)), default=default, help=text)
    if any(get_origin(kind_) is tuple for kind_ in (kind, *get_args(kind))):
        return click.option(flag, multiple=True, type=int, default=default, help=text)
    if get_origin(kind) is Sequence:
        return click.option(flag, multiple=True, default=default, help=text)
    plainest = next(type_ for type_ in (str, int, float) if type_ in (get_args(kind) or (kind,)))
    return click.option(flag, type=plainest, default=default, help=text)


def _to_folders(
    context: click.Context, parameter: click.Parameter, texts: Sequence[str]
) -> Mapping[str, str] | None:
    """What `NAME=DIR` says, all of them; None where nobody says anything."""
    folders: dict[str, str] = {}
    for text in texts:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise click.BadParameter(f"{text!r} is not of the form NAME=DIR")
        if name in folders:
            raise click.BadParameter(f"two adapters have the name {name!r}")
        folders[name] = folder
    return folders or None


_EARLY_STOPPING: Mapping[str, EarlyStopping] = {"false": False, "true": True, "never": "never"}


def _to_early_stopping(context: click.Context, parameter: click.Parameter, text: str) -> EarlyStopping:
    return _EARLY_STOPPING[text]


def _to_mapping(
    context: click.Context, parameter: click.Parameter, texts: Sequence[str]
) -> Mapping[str, float] | None:
    """What `NAME=NUMBER` says, all of them; None where nobody says anything."""
    mapping: dict[str, float] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            mapping[name] = float(number)
        except ValueError:
            name = ""
        if not name:
            raise click.BadParameter(f"{text!r} is not of the form NAME=NUMBER")
    return mapping or None
