"""Texts as OpenAI's APIs take them: one or several, or their token ids."""

from __future__ import annotations

from typing import Annotated, cast

from pydantic import Field

from fastserve.engine.prompt import Prompt

TokenIds = Annotated[list[int], Field(min_length=1)]
TextInput = (
    str
    | TokenIds
    | Annotated[list[str], Field(min_length=1)]
    | Annotated[list[TokenIds], Field(min_length=1)]
)


def name_texts(field: str, value: TextInput) -> list[tuple[str, Prompt]]:
    """Each of them with its place in the request.

    >>> name_texts("input", "a"), name_texts("input", ["a", "b"])
    ([('input', 'a')], [('input[0]', 'a'), ('input[1]', 'b')])
    """
    prompts = to_prompts(value)
    if prompts[0] is value:
        return [(field, prompts[0])]
    return [(f"{field}[{index}]", prompt) for index, prompt in enumerate(prompts)]


def to_prompts(value: str | list[int] | list[str] | list[list[int]]) -> list[Prompt]:
    """Each of them.

    >>> to_prompts([1, 2]), to_prompts(["a", "b"])
    ([[1, 2]], ['a', 'b'])
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value[0], int):
        return [value]
    return cast(list[Prompt], value)
