"""`fastserve chat`: a conversation. Answers go to standard output, all else to standard error."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING

import click

from fastserve.cli.conversation import Conversation
from fastserve.cli.engine_option import engine_options, model_argument, open_llm, sampling_options
from fastserve.cli.generate import completion_to_json
from fastserve.cli.option import json_option, offline_option
from fastserve.cli.report import print_error, print_json
from fastserve.cli.standard_input import LineReader
from fastserve.config import EngineOptions
from fastserve.errors import ContextLengthError, FastServeError
from fastserve.types import SamplingParams

if TYPE_CHECKING:
    from fastserve.engine.completion import Completion
    from fastserve.engine.llm import LLM

_PROBE = ({"role": "user", "content": "Hello!"},)


@click.command()
@model_argument
@sampling_options(SamplingParams(temperature=0.7, top_p=0.9))
@engine_options(
    "weights",
    "kv_dtype",
    "threads",
    "context_length",
    "kv_memory",
    "kv_spill",
    "spill_dir",
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
@json_option
@offline_option
def chat(model: str, params: SamplingParams, options: EngineOptions, json: bool, offline: bool) -> None:
    """Talk with a model.

    Type a question and press Enter; /help lists the commands. Questions may also be piped in, one a line; the
    exit code is then 2 if any line failed.
    """
    conversation = Conversation(params)
    reader = LineReader()
    with open_llm(model, options, task="generate", offline=offline, show_progress=not json) as llm:
        llm.chat_prompt(_PROBE)  # a model without a chat template is refused before anything is asked
        if reader.is_terminal:
            _say(f"{model}, {llm.model.weights} weights, context {llm.model.context_length}; /help for help")
        completions, num_failures = _converse(llm, conversation, reader, is_shown=not json)
    if json:
        documents = [completion_to_json(completion) for completion in completions]
        print_json({"messages": conversation.messages, "completions": documents})
    if num_failures and not reader.is_terminal:
        raise click.exceptions.Exit(2)


def _converse(
    llm: LLM, conversation: Conversation, reader: LineReader, *, is_shown: bool
) -> tuple[list[Completion], int]:
    """Take line by line until the end or /quit; the whole completions, and how many lines failed.

    A line that fails is reported, and the conversation goes on as if it had not been there.
    """
    completions: list[Completion] = []
    num_failures = 0
    while True:
        try:
            line = reader.read_line()
            if line is None or line.strip() == "/quit":
                return completions, num_failures
            completion = _take_line(llm, conversation, line.strip(), is_shown=is_shown)
            completions += [] if completion is None else [completion]
        except FastServeError as error:
            num_failures += 1
            hint = "/reset begins anew" if isinstance(error, ContextLengthError) else error.hint
            print_error(type(error).__name__, error.message, hint, as_json=False)
        except KeyboardInterrupt:
            _say("\n/quit or Ctrl-D leaves")


def _take_line(llm: LLM, conversation: Conversation, line: str, *, is_shown: bool) -> Completion | None:
    """Run a command, or answer a question; the completion where there is a whole one."""
    if line.startswith("/"):
        _say(conversation.run_command(line))
        return None
    return _answer(llm, conversation, line, is_shown=is_shown) if line else None


def _answer(llm: LLM, conversation: Conversation, question: str, *, is_shown: bool) -> Completion | None:
    """Stream the answer. Ctrl-C stops it and keeps what has been said."""
    conversation.ask(question)
    text = ""
    completion = None
    try:
        with closing(llm.stream_chat(conversation.messages, conversation.params)) as chunks:
            for chunk in chunks:
                text += chunk.text
                if is_shown:
                    print(chunk.text, end="", flush=True)
                completion = chunk.completion and chunk.completion.checked()
    except KeyboardInterrupt:
        pass
    except FastServeError:
        conversation.take_back()
        raise
    if is_shown:
        print(flush=True)
    conversation.answer(text)
    _say(_describe(completion, llm.model.context_length))
    return completion


def _describe(completion: Completion | None, context_length: int) -> str:
    if completion is None:
        return "[stopped]"
    parts = [f"{completion.completion_tokens} tokens"]
    if completion.decode_tokens_per_second is not None:
        parts.append(f"{completion.decode_tokens_per_second:.1f} tokens/s")
    if completion.prompt_tokens + completion.completion_tokens == context_length:
        parts.append(f"the context of {context_length} tokens is full: /reset begins anew")
    elif completion.finish_reason == "length":
        parts.append("cut at max_tokens: /set max_tokens none lifts it")
    return f"[{', '.join(parts)}]"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
