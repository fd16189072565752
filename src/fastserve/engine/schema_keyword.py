"""Which keywords of a JSON schema hold schemas: one, a list of them, or several by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Schema = Any  # a mapping, or true or false

ONE = (
    "items", "additionalProperties", "contains", "propertyNames", "unevaluatedItems", "unevaluatedProperties",
    "not", "if", "then", "else",
)  # fmt: skip
SEVERAL = ("allOf", "anyOf", "oneOf", "prefixItems")
NAMED = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")


def children(schema: Mapping[str, Any]) -> Iterable[Schema]:
    """The schemas that this one holds."""
    for keyword, value in schema.items():
        if keyword in ONE or (keyword in SEVERAL and isinstance(value, list)):
            yield from value if isinstance(value, list) else [value]
        elif keyword in NAMED and isinstance(value, Mapping):
            yield from value.values()
