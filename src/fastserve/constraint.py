"""What a completion's text must be: a constraint of `SamplingParams`. Tokens that would break it are never
chosen.

How to use it:

    from fastserve import LLM, Choice, Grammar, JsonSchema, Regex, SamplingParams

    llm.generate(prompt, SamplingParams(constraint=JsonSchema({"type": "object", ...}), max_tokens=200))
    llm.generate(prompt, SamplingParams(constraint=Regex(r"\\d{4}-\\d{2}-\\d{2}")))
    llm.generate(prompt, SamplingParams(constraint=Choice(["yes", "no"])))
    llm.generate(prompt, SamplingParams(constraint=Grammar('start: "a" | "b" start')))
    SamplingParams(constraint=ANY_OBJECT)  # any JSON object

- Making one checks its kind and size; `LLM.generate` and `AsyncLLM.submit` compile it and raise
  `ConstraintError` (an `OptionError`: HTTP 400), which names the reason or the unsupported keywords.
  Compiled ones are kept.
- A completion ends with `stop` as soon as nothing may follow, or where the model chooses to end and the text
  is whole. With `length`, at a stop string or a stop token it may be incomplete.
- It goes with every other parameter but `ignore_eos`: n, stop, seed, penalties, logprobs (which stay those
  of the model itself), speculation.
- A grammar may demand special tokens (`<[128010]>`); `SamplingParams(skip_special_tokens=False)` shows them
  in the text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastserve.errors import ConstraintError
from fastserve.option import check_kind

MAX_CONSTRAINT_CHARACTERS = 131_072  # of a constraint as text


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """JSON that a schema (draft 2020-12) accepts. Keys come in the order of the schema's `properties`.

    Raises:
        ConstraintError: it is no JSON, no valid Unicode, or too large.
    """

    schema: Mapping[str, Any] | bool
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_kind("schema", self.schema, (Mapping, bool), "a JSON schema: an object, or true or false")
        try:
            text = json.dumps(self.schema, ensure_ascii=False, allow_nan=False, default=_to_plain)
        except (TypeError, ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise ConstraintError(f"the schema is not JSON: {reason}") from error
        object.__setattr__(self, "text", _checked("schema", text))


@dataclass(frozen=True, slots=True)
class Regex:
    """Text that a regular expression matches from its beginning to its end: Rust's syntax, without
    look-around and back-references.

    Raises:
        ConstraintError: it is empty, no valid Unicode, or too large.
    """

    pattern: str

    def __post_init__(self) -> None:
        check_kind("pattern", self.pattern, str, "a regular expression")
        _checked("pattern", self.pattern)

    @property
    def text(self) -> str:
        return self.pattern


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some texts.

    Raises:
        ConstraintError: there are none, one is empty or no valid Unicode, or they are too large together.
    """

    options: Sequence[str]
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        is_list = isinstance(self.options, Sequence) and not isinstance(self.options, str)
        if not is_list or not self.options or not all(isinstance(o, str) and o for o in self.options):
            raise ConstraintError(
                f"choice={self.options!r} are not texts to choose from", hint="name some, none of them empty"
            )
        object.__setattr__(self, "options", tuple(self.options))
        object.__setattr__(self, "text", _checked("choice", json.dumps(self.options, ensure_ascii=False)))


@dataclass(frozen=True, slots=True)
class Grammar:
    """Text that a context-free grammar derives from `start`, in the dialect of Lark that llguidance reads
    (github.com/guidance-ai/llguidance, docs/syntax.md).

    Raises:
        ConstraintError: it is empty, no valid Unicode, or too large.
    """

    grammar: str

    def __post_init__(self) -> None:
        check_kind("grammar", self.grammar, str, "a grammar in Lark's syntax")
        _checked("grammar", self.grammar)

    @property
    def text(self) -> str:
        return self.grammar


def _checked(name: str, text: str) -> str:
    if not text.strip():
        raise ConstraintError(f"the {name} is empty")
    if len(text) > MAX_CONSTRAINT_CHARACTERS:
        raise ConstraintError(
            f"the {name} has {len(text)} characters; the limit is {MAX_CONSTRAINT_CHARACTERS}",
            hint="ask for less at once",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConstraintError(
            f"the {name} is not valid Unicode: it has {text[error.start]!r}, half of a pair",
            hint="say both halves, or leave it out",
        ) from error
    return text


def _to_plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} is not JSON")


Constraint = JsonSchema | Regex | Choice | Grammar

ANY_OBJECT = JsonSchema({"type": "object"})
