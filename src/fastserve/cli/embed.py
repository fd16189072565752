"""`fastserve embed`: one vector a text."""

from __future__ import annotations

from typing import Annotated

import typer

from fastserve.cli.engine_option import (
    BackendOption,
    ModelArgument,
    ThreadsOption,
    WeightsOption,
    open_llm,
)
from fastserve.cli.generate import read_texts
from fastserve.cli.option import JsonOption, OfflineOption
from fastserve.cli.report import print_json
from fastserve.config import EngineOptions

app = typer.Typer()


@app.command()
def embed(
    model: ModelArgument,
    texts: Annotated[
        list[str], typer.Argument(metavar="TEXT", help="Texts to embed; - reads standard input.")
    ],
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut texts beyond the model's limit instead of refusing them.")
    ] = False,
    weights: WeightsOption = "auto",
    threads: ThreadsOption = None,
    backend: BackendOption = "native",
    json: JsonOption = False,
    offline: OfflineOption = False,
) -> None:
    """Embed texts with an encoder, such as all-minilm-l6-v2: one line of numbers a text."""

    options = EngineOptions(weights=weights, threads=threads, backend=backend)
    with open_llm(model, options, offline=offline, show_progress=not json) as llm:
        embeddings = llm.embed(read_texts(texts), truncate=truncate).tolist()
    if json:
        print_json({"embeddings": embeddings})
    else:
        for embedding in embeddings:
            print(*embedding)
