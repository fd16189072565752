"""What a completion must be: OpenAI's `response_format`, and fields named as the command line's flags."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from pydantic import ConfigDict, Field

from fastserve.constraint import ANY_OBJECT, Choice, Constraint, Grammar, JsonSchema, Regex
from fastserve.errors import OptionError
from fastserve.serve.schema.body import Body


class NamedSchema(Body):
    """Followed whether `strict` or not."""

    model_config = ConfigDict(serialize_by_alias=True)

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="Any JSON object by default.")
    strict: bool | None = None


class TextFormat(Body):
    type: Literal["text"]


class ObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Body):
    """JSON that a schema accepts."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class ConstraintFields(Body):
    """At most one of these is given."""

    response_format: TextFormat | ObjectFormat | SchemaFormat | None = Field(
        None, description="What the text must be.", discriminator="type"
    )
    json_schema: dict[str, Any] | None = Field(None, description="The text must be JSON that it accepts.")
    regex: str | None = Field(None, description="The text must be what this regular expression matches.")
    choice: list[str] | None = Field(None, description="The text must be one of these.")
    grammar: str | None = Field(None, description="The text must be what it derives, in Lark's syntax.")

    def to_constraint(self) -> Constraint | None:
        """
        Raises:
            OptionError: several are given, or one is malformed or too large.
        """
        found = self.constraints()
        if len(found) > 1:
            raise OptionError(
                f"{' and '.join(found)} cannot be followed together",
                hint="send one of them",
                option=list(found)[1],
            )
        return next((make() for make in found.values()), None)

    @property
    def constraint_field(self) -> str | None:
        """The first of the fields that say what the text must be; None: none does."""
        return next(iter(self.constraints()), None)

    def constraints(self) -> dict[str, Callable[[], Constraint]]:
        """What makes those that are given, by field."""
        found: dict[str, Callable[[], Constraint]] = {}
        match self.response_format:
            case ObjectFormat():
                found["response_format"] = lambda: ANY_OBJECT
            case SchemaFormat(json_schema=NamedSchema(schema_=schema)):
                found["response_format"] = partial(
                    JsonSchema, ANY_OBJECT.schema if schema is None else schema
                )
        if self.json_schema is not None:
            found["json_schema"] = partial(JsonSchema, self.json_schema)
        if self.regex is not None:
            found["regex"] = partial(Regex, self.regex)
        if self.choice is not None:
            found["choice"] = partial(Choice, self.choice)
        if self.grammar is not None:
            found["grammar"] = partial(Grammar, self.grammar)
        return found
