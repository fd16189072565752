"""`fastserve embed`: one vector a text."""

from __future__ import annotations

from collections.abc import Sequence

import click

from fastserve.cli.engine_option import engine_options, model_argument, open_llm
from fastserve.cli.generate import read_texts
from fastserve.cli.option import json_option, offline_option
from fastserve.cli.profile import profile_option, profiling
from fastserve.cli.report import print_json
from fastserve.config import EngineOptions


@click.command()
@model_argument
@click.argument(
    "texts",
    metavar="TEXT...",
    nargs=-1,
    required=True,
    help="Texts to embed; - reads one from standard input.",
)
@click.option(
    "--truncate", is_flag=True, help="Cut texts that are too long for the model instead of refusing them."
)
@engine_options("weights", "threads", "backend", "device")
@profile_option
@json_option
@offline_option
def embed(
    model: str,
    texts: Sequence[str],
    truncate: bool,
    options: EngineOptions,
    profile: bool,
    json: bool,
    offline: bool,
) -> None:
    """Turn texts into vectors.

    The model must be an encoder, such as all-minilm-l6-v2. Prints one line of numbers for each text.
    """
    whole_texts = read_texts(texts)
    with (
        open_llm(model, options, task="embed", offline=offline, show_progress=not json) as llm,
        profiling(llm, shown=profile),
    ):
        embeddings = llm.embed(whole_texts, truncate=truncate).tolist()
    if json:
        print_json({"embeddings": embeddings})
    else:
        for embedding in embeddings:
            print(*embedding)
