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
            for a million tokens.
    """
    if not isinstance(prompt, str):
        return prompt
    limit = model.context_length
    if len(prompt) > limit and (least := model.tokenizer.min_tokens(prompt)) > limit:
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
    text = render_prompt(model, messages, tools=tools, variables=variables)
    return encode_prompt(model, text, add_special_tokens=False)  # the template writes them


def render_prompt(
    model: LoadedModel,
    messages: Seq[Message],
    *,
    tools: Seq[JsonObject] | None = None,
    variables: JsonObject | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """The text of a conversation, by the model's chat template, which writes special tokens too. Arguments
    and errors as of `encode_chat`."""
    return render_chat(
        model.checkpoint.chat_template,
        messages,
        special_tokens=model.tokenizer.special_tokens,
        add_generation_prompt=add_generation_prompt,
        tools=tools,
        variables=variables,
    )


def encode_text(model: LoadedModel, text: str, *, truncate: bool = False) -> Seq[int]:
    """The token ids of a text to embed, special tokens included, within the model's limit.

    Args:
        truncate: cut a text that is longer than the model was tuned with, instead of refusing what it cannot
            take.

    Raises:
        ContextLengthError: it is longer than the limit.
    """
    tokenizer, limit = model.tokenizer, model.reading_length if truncate else model.context_length
    if not truncate and (least := tokenizer.min_tokens(text)) > limit:  # see encode_prompt
        raise _too_long_to_embed(f"at least {least}", limit)
    token_ids = tokenizer.encode(text)
    if len(token_ids) <= limit:
        return token_ids
    if not truncate:
        raise _too_long_to_embed(str(len(token_ids)), limit)
    return [*token_ids[: limit - 1], token_ids[-1]]  # the last one closes the text


def _too_long_to_embed(num_tokens: str, limit: int) -> ContextLengthError:
    return ContextLengthError(
        f"a text has {num_tokens} tokens; the model embeds at most {limit}",
        hint="split the text, or ask for truncation",
    )
