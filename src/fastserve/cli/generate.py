"""`fastserve generate`: complete prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastserve.cli.constraint_option import constraint_options
from fastserve.cli.engine_option import engine_options, generation_options, model_argument, open_llm
from fastserve.cli.option import json_option, offline_option
from fastserve.cli.profile import profile_option, profiling
from fastserve.cli.report import print_json
from fastserve.cli.standard_input import read_text
from fastserve.config import EngineOptions
from fastserve.constraint import Constraint
from fastserve.types import SamplingParams

if TYPE_CHECKING:
    from fastserve.engine.completion import Completion
    from fastserve.engine.llm import LLM
    from fastserve.engine.prompt import Prompt

STDIN = "-"
_ADAPTER = "adapter"  # what it is called beside the model


@click.command()
@model_argument
@click.argument(
    "prompts",
    metavar="PROMPT...",
    nargs=-1,
    required=True,
    help="Texts to go on from; - reads one from standard input.",
)
@click.option(
    "--chat", is_flag=True, help="Answer each prompt as a user's message (needs a model tuned for chat)."
)
@click.option(
    "--timeout-ms", type=float, help="Give up on a completion that takes longer; by default none does."
)
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Add the LoRA or DoRA adapter in this folder, as peft saves them, to the model's weights.",
)
@generation_options(SamplingParams())
@constraint_options
@engine_options(
    "weights",
    "kv_dtype",
    "threads",
    "context_length",
    "kv_memory",
    "kv_spill",
    "spill_dir",
    "policy",
    "speculation",
    "max_draft_tokens",
    "prompt_lookup_min",
    "prompt_lookup_max",
    "draft_model",
    "draft_weights",
    "draft_layers",
    "draft_kv_memory",
    "backend",
    "device",
)
@profile_option
@json_option
@offline_option
def generate(
    model: str,
    prompts: Sequence[str],
    chat: bool,
    timeout_ms: float | None,
    adapter: Path | None,
    params: SamplingParams,
    constraint: Constraint | None,
    options: EngineOptions,
    profile: bool,
    json: bool,
    offline: bool,
) -> None:
    """Complete prompts.

    The model goes on from where each prompt ends; with --chat it answers it. An encoder-decoder writes what
    it makes of the prompt, such as its translation. With --json-schema, --regex, --choice or --grammar the
    text is what that one demands, unless --max-tokens ends it before. The text of a single prompt is printed
    as it comes, that of several, which run together, at the end.
    """
    texts = read_texts(prompts)
    params = replace(params, constraint=constraint)
    name = None
    if adapter is not None:
        from fastserve.checkpoint.adapter import open_adapter

        name, rank = _ADAPTER, open_adapter(adapter.expanduser()).max_rank
        options = replace(options, adapters={name: adapter}, max_adapters=1, max_adapter_rank=rank)
    with open_llm(model, options, task="generate", offline=offline, show_progress=not json) as llm:
        requests = [_to_prompt(llm, text, chat=chat) for text in texts]
        with profiling(llm, shown=profile):
            if json:
                completions = llm.generate(requests, params, timeout_ms=timeout_ms, adapter=name)
                documents = [completion_to_json(completion.checked()) for completion in completions]
                print_json(documents[0] if len(documents) == 1 else {"completions": documents})
            elif len(requests) == 1:
                _stream(llm, requests[0], params, timeout_ms, name)
            else:
                _print_all(texts, llm.generate(requests, params, timeout_ms=timeout_ms, adapter=name))


def read_texts(arguments: Sequence[str]) -> list[str]:
    """The arguments, `-` replaced by what standard input holds, less the line break that ends it.

    Raises:
        OptionError: standard input is not text.
    """
    return [read_text().removesuffix("\n") if text == STDIN else text for text in arguments]


def completion_to_json(completion: Completion) -> Mapping[str, Any]:
    """The document of one completion; `decode_tokens_per_second` is null for a single token."""
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        "decode_tokens_per_second": completion.decode_tokens_per_second,
        "time_to_first_token_seconds": completion.time_to_first_token_seconds,
        "seed": completion.seed,
    }


def _to_prompt(llm: LLM, text: str, *, chat: bool) -> Prompt:
    return llm.chat_prompt([{"role": "user", "content": text}]) if chat else text


def _stream(
    llm: LLM, prompt: Prompt, params: SamplingParams, timeout_ms: float | None, adapter: str | None
) -> None:
    completion = None
    for chunk in llm.stream(prompt, params, timeout_ms=timeout_ms, adapter=adapter):
        print(chunk.text, end="", flush=True)
        completion = chunk.completion
    print()
    if completion is not None:
        completion.checked()


def _print_all(texts: Sequence[str], completions: Sequence[Completion]) -> None:
    """Each completion under its prompt, headed as `head` heads several files."""
    for text, completion in zip(texts, completions, strict=True):
        print(f"==> {text} <==\n{completion.checked().text}\n")
