"""`fastserve chat`: a conversation. Answers go to standard output, all else to standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import click

from fastserve.cli.conversation import Conversation
from fastserve.cli.engine_option import engine_options, model_argument, open_llm, sampling_options
from fastserve.cli.generate import completion_to_json
from fastserve.cli.option import json_option, offline_option
from fastserve.cli.report import print_error, print_json
from fastserve.config import EngineOptions
from fastserve.errors import ContextLengthError, OptionError
from fastserve.types import SamplingParams

if TYPE_CHECKING:
    from fastserve.engine.completion import Completion
    from fastserve.engine.llm import LLM


@click.command()
@model_argument
@sampling_options(SamplingParams(temperature=0.7, top_p=0.9))
@engine_options("weights", "kv_dtype", "threads", "context_length", "kv_memory", "backend")
@json_option
@offline_option
def chat(model: str, params: SamplingParams, options: EngineOptions, json: bool, offline: bool) -> None:
    """Talk with a model; /help lists what can be typed. Questions may also be piped in, one a line."""
    conversation = Conversation(params)
    with open_llm(model, options, offline=offline, show_progress=not json) as llm:
        if sys.stdin.isatty():
            _say(f"{model}, {llm.model.weights} weights, context {llm.model.context_length}; /help for help")
        answers = (_take_line(llm, conversation, line, is_shown=not json) for line in _read_lines())
        completions = [completion for completion in answers if completion is not None]
    if json:
        documents = [completion_to_json(completion) for completion in completions]
        print_json({"messages": conversation.messages, "completions": documents})


def _read_lines() -> Iterator[str]:
    """What is typed or piped in, line by line, until its end or /quit."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401 - gives input() its history and keys
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            _say("\n/quit or Ctrl-D leaves")
            continue
        if line == "/quit":
            return
        if line:
            yield line


def _take_line(llm: LLM, conversation: Conversation, line: str, *, is_shown: bool) -> Completion | None:
    """Run a command, or answer a question; the completion where there is a whole one."""
    if not line.startswith("/"):
        return _answer(llm, conversation, line, is_shown=is_shown)
    try:
        _say(conversation.run_command(line))
    except OptionError as error:
        print_error(type(error).__name__, error.message, error.hint, as_json=False)
    return None


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
                completion = chunk.completion
    except KeyboardInterrupt:
        pass
    except ContextLengthError as error:
        conversation.take_back()
        print_error(type(error).__name__, error.message, "/reset begins anew", as_json=False)
        return None
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
