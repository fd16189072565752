"""From what a user writes to the token ids of a prompt, within the model's context."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from fastserve.checkpoint.chat_template import render_chat
from fastserve.engine.load import LoadedModel
from fastserve.errors import ContextLengthError
from fastserve.types import JsonObject

Prompt = str | Seq[int]
"""A text, or token ids, which are used as they are."""

Message = Mapping[str, Any]
"""A turn of a conversation: `role` and `content`, and whatever else the model's chat template reads."""


def encode_prompt(model: LoadedModel, prompt: Prompt, *, add_special_tokens: bool = True) -> Seq[int]:
    """The token ids of a prompt.

    Raises:
        ContextLengthError: a text is certain not to fit. It is refused unencoded, as encoding takes seconds
        for
            a million tokens.
    """
    if not isinstance(prompt, str):
        return prompt
    limit = model.context_length
    if len(prompt) >= limit and (least := model.tokenizer.min_tokens(prompt)) >= limit:
        raise ContextLengthError(
            f"the prompt has {len(prompt)} characters, which are at least {least} tokens; "
            f"the context is {limit} tokens",
            hint="shorten the prompt, or load the model with a larger context_length if it allows one",
        )
    return model.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)


def encode_chat(
    model: LoadedModel,
    messages: Seq[Message],
    *,
    tools: Seq[JsonObject] | None = None,
    variables: JsonObject | None = None,
) -> Seq[int]:
    """The token ids of a conversation that is to be answered, by the model's chat template.

    Args:
        tools: JSON schemas of functions that the model may call, for templates that know of tools.
        variables: what else the template reads, by name, such as `{"enable_thinking": False}`.

    Raises:
        TemplateError: the model has no chat template, or it failed on these messages.
        ContextLengthError: as encode_prompt.
    """
    text = render_chat(
        model.checkpoint.chat_template,
        messages,
        special_tokens=model.tokenizer.special_tokens,
        tools=tools,
        variables=variables,
    )
    return encode_prompt(model, text, add_special_tokens=False)  # the template writes them
