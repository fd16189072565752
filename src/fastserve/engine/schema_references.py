"""References of a JSON schema: within it, by pointers, anchors and URIs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urljoin

from fastserve.engine.narrow_budget import NarrowBudget
from fastserve.engine.schema_keyword import NAMED, ONE, SEVERAL, Schema, children
from fastserve.errors import ConstraintError

_COUNTS = (
    "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minContains",
    "maxContains",
)  # fmt: skip
_ANNOTATIONS = (
    "$schema", "$id", "$anchor", "$dynamicAnchor", "$comment", "$vocabulary", "$defs", "definitions", "title",
    "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "contentEncoding",
    "contentMediaType", "contentSchema",
)  # fmt: skip
# These say nothing without the other.
_MEANT_WITH = {"then": "if", "else": "if", "minContains": "contains", "maxContains": "contains"}
# Those of the compiler. Others say nothing about what is valid, as the draft has it.
_FORMATS = (
    "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
)  # fmt: skip


class SchemaReferences:
    """Takes a document apart at its references: each becomes `#/$defs/N`."""

    def __init__(self, root: Schema, budget: NarrowBudget) -> None:
        self.found: dict[str, Schema] = {}  # by N
        self._places: dict[str, tuple[Schema, str]] = {}  # by URI: schema, and the base of its own references
        self._names: dict[int, str] = {}  # by identity of the schema: N
        self._dynamic: dict[str, int] = {}  # how many anchors of a name
        self._budget = budget
        self._register(root, "")

    def take(self, schema: Schema, base: str) -> Schema:
        """The schema with its references replaced, and without annotations."""
        if not isinstance(schema, Mapping):
            return schema
        self._budget.spend(len(schema))
        base = urljoin(base, schema.get("$id", ""))
        taken: dict[str, Any] = {}
        for keyword, value in schema.items():
            if keyword in ("$ref", "$dynamicRef"):
                taken.setdefault("allOf", []).append({"$ref": self._resolve(keyword, value, base)})
            elif keyword in _MEANT_WITH and _MEANT_WITH[keyword] not in schema:
                continue
            elif keyword in ONE:
                taken[keyword] = self.take(value, base)
            elif keyword in SEVERAL:
                taken[keyword] = [*taken.get(keyword, []), *(self.take(item, base) for item in value)]
            elif keyword in NAMED and keyword not in _ANNOTATIONS:
                taken[keyword] = {name: self.take(item, base) for name, item in value.items()}
            elif keyword in _COUNTS and isinstance(value, float) and value.is_integer():
                taken[keyword] = int(value)
            elif keyword not in _ANNOTATIONS and (keyword != "format" or value in _FORMATS):
                taken[keyword] = value
        return taken

    def _register(self, schema: Schema, base: str) -> None:
        if not isinstance(schema, Mapping):
            return
        base = urljoin(base, schema.get("$id", ""))
        if "$id" in schema or not self._places:
            self._places[base.removesuffix("#")] = (schema, base)
        for keyword in ("$anchor", "$dynamicAnchor"):
            if keyword in schema:
                self._places[f"{base}#{schema[keyword]}"] = (schema, base)
        if "$dynamicAnchor" in schema:
            name = schema["$dynamicAnchor"]
            self._dynamic[name] = self._dynamic.get(name, 0) + 1
        for child in children(schema):
            self._register(child, base)

    def _resolve(self, keyword: str, reference: str, base: str) -> str:
        uri = urljoin(base, reference) if reference else base
        resource, _, fragment = uri.partition("#")
        if keyword == "$dynamicRef" and self._dynamic.get(fragment, 0) > 1:
            raise ConstraintError(
                f"the schema has $dynamicRef {reference!r}, which has several targets", hint="use $ref"
            )
        if uri.removesuffix("#") in self._places:
            target, target_base = self._places[uri.removesuffix("#")]
        elif resource in self._places and (not fragment or fragment.startswith("/")):
            target, target_base = self._follow(*self._places[resource], fragment, reference)
        else:
            raise ConstraintError(
                f"the schema refers to {reference!r}, which is not within it", hint="put it into $defs"
            )
        if id(target) not in self._names or isinstance(target, bool):
            name = str(len(self.found))
            self._names[id(target)] = name
            self.found[name] = True  # for references back to it
            self.found[name] = self.take(target, target_base)
        return f"#/$defs/{self._names[id(target)]}"

    def _follow(self, schema: Schema, base: str, pointer: str, reference: str) -> tuple[Schema, str]:
        for part in pointer.split("/")[1:]:
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            try:
                schema = schema[int(key)] if isinstance(schema, list) else schema[key]
            except (KeyError, IndexError, ValueError, TypeError) as error:
                raise ConstraintError(f"the schema refers to {reference!r}, which is not there") from error
            if isinstance(schema, Mapping) and isinstance(schema.get("$id"), str):
                base = urljoin(base, schema["$id"])
        if not isinstance(schema, Mapping | bool):
            raise ConstraintError(f"the schema refers to {reference!r}, which is no schema")
        return schema, base
