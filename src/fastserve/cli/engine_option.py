"""Options of the commands that run a model, and how such a command opens it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from fastserve.config import Backend, EngineOptions, KvDtype, WeightsChoice

if TYPE_CHECKING:
    from fastserve.engine.llm import LLM

ModelArgument = Annotated[
    str, typer.Argument(metavar="NAME_OR_DIR", help="A model's name, source, folder or .gguf file.")
]
WeightsOption = Annotated[
    WeightsChoice,
    typer.Option(help="Format of the weights; auto is int8 for text generation and f32 for encoders."),
]
KvDtypeOption = Annotated[KvDtype, typer.Option(help="Format of stored keys and values.")]
ThreadsOption = Annotated[
    int | None, typer.Option(help="Threads of the native backend; by default the cores this process may use.")
]
ContextLengthOption = Annotated[
    int | None,
    typer.Option(help="Most tokens of prompt and completion; by default the model's own, up to 8192."),
]
KvMemoryOption = Annotated[
    str | None, typer.Option(help="Memory for keys and values, such as 512MiB; by default from what is free.")
]
BackendOption = Annotated[Backend, typer.Option(help="What runs the model; torch is the reference.")]

MaxTokensOption = Annotated[
    int | None, typer.Option(help="Most tokens to generate; by default until the context is full.")
]
TemperatureOption = Annotated[float, typer.Option(help="Randomness; 0 always takes the likeliest token.")]
TopKOption = Annotated[int, typer.Option(help="Choose among the K likeliest tokens; 0 is off.")]
TopPOption = Annotated[
    float, typer.Option(help="Choose among the likeliest tokens that sum to this probability; 1 is off.")
]
MinPOption = Annotated[
    float, typer.Option(help="Leave out tokens less likely than this share of the likeliest; 0 is off.")
]
SeedOption = Annotated[
    int | None, typer.Option(help="Makes random choices repeatable; by default fresh for every request.")
]
StopOption = Annotated[
    list[str] | None, typer.Option(help="End before this text; may be given several times.")
]


def open_llm(model: str, options: EngineOptions, *, offline: bool, show_progress: bool) -> LLM:
    """Load a model, downloading it first where it is not here. Raises as LLM."""
    from fastserve.cli.progress_bar import download_progress
    from fastserve.engine.llm import LLM
    from fastserve.hub.resolve import resolve

    with download_progress(shown=show_progress) as progress:
        path = resolve(model, offline=offline, progress=progress)
    return LLM(path, **asdict(options))
