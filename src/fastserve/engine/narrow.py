"""Writes a JSON schema without the keywords that the compiler of constraints lacks.

What the new schema accepts the old one accepts too; the reverse need not hold. Where several schemas apply
to one value it makes alternatives of them, each a conjunction: what an alternative evaluates is then known,
as `unevaluatedProperties` asks, and a negation is a matter of single keywords. Keywords: JSON Schema draft
2020-12, core and validation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any
from urllib.parse import unquote, urljoin

from fastserve.constraint import MAX_CONSTRAINT_CHARACTERS
from fastserve.errors import ConstraintError

Schema = Any  # a mapping, or true or false

_MOST_ALTERNATIVES = 256  # of one value
_MOST_NESTED = 32  # references that apply to one value, and negations
_MOST_NODES = 20_000  # made of a document, kept or not, at some 3 us
_ENTRIES_PER_NODE = 8  # of a list or a mapping that is gone through: what costs as much as a node

_TYPES = ("null", "boolean", "object", "array", "number", "string")
_COUNTS = (
    "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minContains",
    "maxContains",
)  # fmt: skip
_ONE = (
    "items", "additionalProperties", "contains", "propertyNames", "unevaluatedItems", "unevaluatedProperties",
    "not", "if", "then", "else",
)  # fmt: skip
_SEVERAL = ("allOf", "anyOf", "oneOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
_ANNOTATIONS = (
    "$schema", "$id", "$anchor", "$dynamicAnchor", "$comment", "$vocabulary", "$defs", "definitions", "title",
    "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "contentEncoding",
    "contentMediaType", "contentSchema",
)  # fmt: skip
# These say nothing without the other.
_MEANT_WITH = {"then": "if", "else": "if", "minContains": "contains", "maxContains": "contains"}
# What the compiler lacks, or does not always have.
_REWRITTEN = (
    "not", "if", "dependentRequired", "dependentSchemas", "unevaluatedProperties", "unevaluatedItems",
    "contains", "propertyNames", "uniqueItems", "oneOf",
)  # fmt: skip
# Those of the compiler. Others say nothing about what is valid, as the draft has it.
_FORMATS = (
    "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
)  # fmt: skip


def narrow_schema(schema: Schema) -> Schema:
    """
    Raises:
        ConstraintError: a keyword, or a reference, that cannot be rewritten; or the new schema would be too
            large.
    """
    budget = _Budget()
    targets = _References(schema, budget)
    root = targets.take(schema, "")
    narrower = _Narrower(targets.found, budget)
    narrowed = narrower.narrow(root)
    done: dict[str, Schema] = {}
    while pending := [name for name in targets.found if name not in done]:
        for name in pending:
            done[name] = narrower.narrow(targets.found[name])
    if done:
        whole = {"allOf": [narrowed]} if isinstance(narrowed, bool) else narrowed
        narrowed = {**whole, "$defs": done}
    budget.check_length(narrowed)
    return narrowed


class _Budget:
    """Of a whole document. What it grows by multiplies with each level of nesting: the work ends where the
    limit is reached, not where all is built.
    """

    def __init__(self) -> None:
        self._num_nodes = 0
        self._lengths: dict[int, tuple[Schema, int]] = {}  # by identity, which holds while the schema is kept

    def spend(self, num_entries: int = 0) -> None:
        """For one node, with so many entries to go through."""
        self._num_nodes += 1 + num_entries // _ENTRIES_PER_NODE
        if self._num_nodes > _MOST_NODES:
            raise ConstraintError(
                f"the schema grows beyond {_MOST_NODES} nodes where it is written without keywords that are "
                "not supported",
                hint="nest fewer oneOf, not and if",
            )

    def check_length(self, schema: Schema) -> None:
        """Before it is written: what is built once may stand in it many times."""
        length = self._length(schema)
        if length > MAX_CONSTRAINT_CHARACTERS:
            raise ConstraintError(
                f"the schema has {length} characters where it is written without keywords that are not "
                f"supported; the limit is {MAX_CONSTRAINT_CHARACTERS}",
                hint="nest fewer oneOf, not and if",
            )

    def _length(self, value: Any) -> int:
        """Characters of JSON, at least."""
        if isinstance(value, str):
            return len(value) + 2
        if not isinstance(value, Mapping | Sequence):
            return len(repr(value))
        known = self._lengths.get(id(value))
        if known is None:
            entries = value.values() if isinstance(value, Mapping) else value
            length = sum(self._length(entry) + 2 for entry in entries)
            if isinstance(value, Mapping):
                length += sum(len(str(key)) + 4 for key in value)
            known = self._lengths[id(value)] = value, max(length, 2)
        return known[1]


class _References:
    """Takes a document apart at its references: each becomes `#/$defs/N`."""

    def __init__(self, root: Schema, budget: _Budget) -> None:
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
            elif keyword in _ONE:
                taken[keyword] = self.take(value, base)
            elif keyword in _SEVERAL:
                taken[keyword] = [*taken.get(keyword, []), *(self.take(item, base) for item in value)]
            elif keyword in _NAMED and keyword not in _ANNOTATIONS:
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
        for child in _children(schema):
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


@dataclass(frozen=True, slots=True)
class _Alternative:
    """Schemas that all hold, and what they evaluate."""

    schemas: tuple[Schema, ...] = ()
    names: frozenset[str] = frozenset()
    patterns: frozenset[str] = frozenset()
    num_items: int = 0
    items: tuple[Schema, ...] = ()  # items of one of these are evaluated wherever they stand
    has_all_properties: bool = False
    has_all_items: bool = False

    def __add__(self, other: _Alternative) -> _Alternative:
        return _Alternative(
            self.schemas + other.schemas,
            self.names | other.names,
            self.patterns | other.patterns,
            max(self.num_items, other.num_items),
            self.items + other.items,
            self.has_all_properties or other.has_all_properties,
            self.has_all_items or other.has_all_items,
        )


_NOTHING = _Alternative()


@dataclass(slots=True)
class _Narrower:
    targets: Mapping[str, Schema]
    budget: _Budget
    nested: int = 0

    def narrow(self, schema: Schema) -> Schema:
        """The schema in keywords that the compiler has."""
        if not isinstance(schema, Mapping):
            return schema
        self.budget.spend(len(schema))
        if not any(keyword in schema for keyword in _REWRITTEN):
            return self._narrow_children(schema)
        return _any_of(_all_of(a.schemas) for a in self._expand(schema, follows=False))

    def _narrow_children(self, schema: Mapping[str, Any]) -> Schema:
        narrowed: dict[str, Any] = {}
        for keyword, value in schema.items():
            if keyword in _ONE:
                narrowed[keyword] = self.narrow(value)
            elif keyword in _SEVERAL:
                narrowed[keyword] = [self.narrow(item) for item in value]
            elif keyword in _NAMED:
                narrowed[keyword] = {name: self.narrow(item) for name, item in value.items()}
            else:
                narrowed[keyword] = value
        return narrowed

    def _expand(self, schema: Schema, *, follows: bool) -> list[_Alternative]:
        """Alternatives, one of which holds where the schema does; of narrowed schemas.

        Args:
            follows: take references apart too, as what they evaluate is asked for.
        """
        self.budget.spend(len(schema) if isinstance(schema, Mapping) else 0)
        if not isinstance(schema, Mapping):
            return [_NOTHING] if schema is True else []
        follows = follows or "unevaluatedProperties" in schema or "unevaluatedItems" in schema
        if "$ref" in schema and follows:
            with_target = self._follow(schema["$ref"], lambda target: self._expand(target, follows=True))
            schema = {key: value for key, value in schema.items() if key != "$ref"}
            factors = [with_target]
        else:
            factors = []
        factors += [[self._plain(schema)], *self._applicators(schema, follows), *self._assertions(schema)]
        alternatives = self._multiply(factors)
        if "unevaluatedProperties" in schema:
            alternatives = [self._close_object(a, schema["unevaluatedProperties"]) for a in alternatives]
        if "unevaluatedItems" in schema:
            alternatives = [self._close_array(a, schema["unevaluatedItems"]) for a in alternatives]
        return alternatives

    def _multiply(self, factors: Iterable[list[_Alternative]]) -> list[_Alternative]:
        """All combinations of one alternative each."""
        products = [_NOTHING]
        for factor in factors:
            if len(products) * len(factor) > _MOST_ALTERNATIVES:
                raise ConstraintError(
                    f"the schema has more than {_MOST_ALTERNATIVES} alternatives at one place",
                    hint="simplify it",
                )
            products = [a + b for a, b in product(products, factor)]
            for one in products:
                self.budget.spend(len(one.schemas) + len(one.names) + len(one.patterns) + len(one.items))
        return products

    def _plain(self, schema: Mapping[str, Any]) -> _Alternative:
        """What needs no rewriting."""
        left_out = (*_REWRITTEN, "allOf", "anyOf", "then", "else", "minContains", "maxContains")
        plain = {keyword: value for keyword, value in schema.items() if keyword not in left_out}
        return _Alternative(
            schemas=(self._narrow_children(plain),) if plain else (),
            names=frozenset(plain.get("properties", ())),
            patterns=frozenset(plain.get("patternProperties", ())),
            num_items=len(plain.get("prefixItems", ())),
            has_all_properties="additionalProperties" in plain,
            has_all_items="items" in plain,
        )

    def _applicators(self, schema: Mapping[str, Any], follows: bool) -> Iterable[list[_Alternative]]:
        """Of the keywords that apply schemas to the value itself."""

        def expand(*schemas: Schema) -> list[_Alternative]:
            return self._multiply([self._expand(one, follows=follows) for one in schemas])

        def refuse(*schemas: Schema) -> list[_Alternative]:  # they evaluate nothing
            alternatives = expand(*(self.negate(one) for one in schemas))
            return [_Alternative(alternative.schemas) for alternative in alternatives]

        for one in schema.get("allOf", ()):
            yield expand(one)
        if "anyOf" in schema:
            yield [a for one in schema["anyOf"] for a in expand(one)]
        if "oneOf" in schema:
            options = schema["oneOf"]
            yield [
                alternative
                for index, one in enumerate(options)
                for alternative in self._multiply(
                    [expand(one), refuse(*options[:index], *options[index + 1 :])]
                )
            ]
        if "not" in schema:
            yield refuse(schema["not"])
        if "if" in schema and ("then" in schema or "else" in schema):
            condition = schema["if"]
            yield [
                *expand(condition, schema.get("then", True)),
                *self._multiply([refuse(condition), expand(schema.get("else", True))]),
            ]
        for name, names in schema.get("dependentRequired", {}).items():
            yield expand({"properties": {name: False}}) + expand({"required": [name, *names]})
        for name, one in schema.get("dependentSchemas", {}).items():
            yield expand({"properties": {name: False}}) + expand({"required": [name]}, one)

    def _assertions(self, schema: Mapping[str, Any]) -> Iterable[list[_Alternative]]:
        """Of other keywords that are rewritten."""
        if "contains" in schema:
            yield self._contains(schema)
        if "propertyNames" in schema:
            yield self._property_names(schema["propertyNames"])
        if schema.get("uniqueItems") and schema.get("maxItems", 2) > 1:
            yield self._unique_items(schema)

    def _contains(self, schema: Mapping[str, Any]) -> list[_Alternative]:
        """The first items are those that are asked for, or those behind `prefixItems`."""
        wanted = schema["contains"]
        least, most = schema.get("minContains", 1), schema.get("maxContains")
        item = self.narrow(wanted)
        rest: dict[str, Any] = {}
        if most is not None:
            other = self.narrow(self.negate(wanted))
            rest = {"maxItems": most} if other is False else {"items": other}
        found = [_Alternative((_other_types("array"),))]
        if not least and most is None:
            return [_Alternative(items=(wanted,))]
        if most is not None and most < least:
            return found
        for num_before in {0, len(schema.get("prefixItems", ()))}:
            if num_before and rest:
                continue
            self.budget.spend(num_before + least)
            items = {"prefixItems": [True] * num_before + [item] * least} if num_before + least else {}
            array = {"type": "array", **items, "minItems": num_before + least, **rest}
            found.append(_Alternative((array,), num_items=0 if num_before else least, items=(wanted,)))
        return found

    def _property_names(self, names: Schema) -> list[_Alternative]:
        match names:
            case True:
                return [_NOTHING]
            case False:
                allowed: dict[str, Any] = {"additionalProperties": False}
            case {"pattern": str(pattern), **others} if not others:
                allowed = {"patternProperties": {pattern: True}, "additionalProperties": False}
            case {"enum": list(texts), **others} if not others:
                allowed = {"properties": dict.fromkeys(texts, True), "additionalProperties": False}
            case {"const": str(text), **others} if not others:
                allowed = {"properties": {text: True}, "additionalProperties": False}
            case {**others} if others.keys() <= {"minLength", "maxLength", "type"}:
                limits = f"{{{others.get('minLength', 0)},{others.get('maxLength', '')}}}"
                allowed = {"patternProperties": {f"^(.|\\n){limits}$": True}, "additionalProperties": False}
            case _:
                raise _unsupported("propertyNames")
        return [_Alternative((_other_types("object"),)), _Alternative(({"type": "object", **allowed},))]

    def _unique_items(self, schema: Mapping[str, Any]) -> list[_Alternative]:
        """At most one item, where arrays are not what the schema is about."""
        if schema.get("type") is not None:
            raise _unsupported("uniqueItems")
        return [
            _Alternative((_other_types("array"),)),
            _Alternative(({"type": "array", "maxItems": 1},)),
        ]

    def _close_object(self, alternative: _Alternative, others: Schema) -> _Alternative:
        if alternative.has_all_properties:
            return alternative
        closed = {
            "properties": dict.fromkeys(sorted(alternative.names), True),
            "patternProperties": dict.fromkeys(sorted(alternative.patterns), True),
            "additionalProperties": self.narrow(others),
        }
        return alternative + _Alternative((closed,), has_all_properties=True)

    def _close_array(self, alternative: _Alternative, others: Schema) -> _Alternative:
        if alternative.has_all_items:
            return alternative
        allowed = [self.narrow(one) for one in (others, *alternative.items)]
        closed: dict[str, Any] = {"items": _any_of(allowed)}
        if alternative.num_items:
            self.budget.spend(alternative.num_items)
            closed["prefixItems"] = [True] * alternative.num_items
        return alternative + _Alternative((closed,), has_all_items=True)

    def negate(self, schema: Schema) -> Schema:
        """A schema of values that this one refuses, not of all of them; False where none is found."""
        self.budget.spend(len(schema) if isinstance(schema, Mapping) else 0)
        if not isinstance(schema, Mapping):
            return not schema
        return _any_of(
            one for key, value in schema.items() for one in self._negate_keyword(schema, key, value)
        )

    def _negate_keyword(self, schema: Mapping[str, Any], keyword: str, value: Any) -> Iterable[Schema]:
        match keyword:
            case "type":
                yield _other_types(*([value] if isinstance(value, str) else value))
            case "const" | "enum":
                self.budget.spend(0 if keyword == "const" else len(value))
                yield _other_types(*{_type_of(one) for one in ([value] if keyword == "const" else value)})
            case "required":
                for name in value:
                    self.budget.spend()
                    yield {"type": "object", "properties": {name: False}}
            case "properties":
                for name, one in value.items():
                    yield {"type": "object", "required": [name], "properties": {name: self.negate(one)}}
            case "items" if "prefixItems" not in schema:
                yield {"type": "array", "minItems": 1, "prefixItems": [self.negate(value)]}
            case "prefixItems":
                for i, one in enumerate(value):
                    self.budget.spend(i)
                    before = [True] * i
                    yield {"type": "array", "minItems": i + 1, "prefixItems": [*before, self.negate(one)]}
            case "contains" if schema.get("minContains", 1) >= 1:
                yield {"type": "array", "items": self.negate(value)}
            case "minimum" | "exclusiveMinimum" | "maximum" | "exclusiveMaximum":
                yield {"type": "number", _OPPOSITE_BOUND[keyword]: value}
            case "minLength" | "minItems" | "minProperties" if value > 0:
                yield {"type": _SIZED[keyword[3:]], f"max{keyword[3:]}": value - 1}
            case "maxLength" | "maxItems" | "maxProperties":
                yield {"type": _SIZED[keyword[3:]], f"min{keyword[3:]}": value + 1}
            case "anyOf" | "oneOf":
                yield _all_of(tuple(self.negate(one) for one in value))
            case "allOf":
                yield from (self.negate(one) for one in value)
            case "not":
                yield value
            case "$ref":
                yield self._follow(value, self.negate)

    def _follow(self, reference: str, act: Callable[[Schema], Any]) -> Any:
        self.nested += 1
        if self.nested > _MOST_NESTED:
            raise ConstraintError("the schema refers to itself without end")
        try:
            return act(self.targets[reference.removeprefix("#/$defs/")])
        finally:
            self.nested -= 1


_OPPOSITE_BOUND = {
    "minimum": "exclusiveMaximum",
    "exclusiveMinimum": "maximum",
    "maximum": "exclusiveMinimum",
    "exclusiveMaximum": "minimum",
}
_SIZED = {"Length": "string", "Items": "array", "Properties": "object"}


def _all_of(schemas: tuple[Schema, ...]) -> Schema:
    if any(schema is False for schema in schemas):
        return False
    kept = [schema for schema in schemas if schema is not True and schema != {}]
    if not kept:
        return True
    return kept[0] if len(kept) == 1 else {"allOf": kept}


def _any_of(schemas: Iterable[Schema]) -> Schema:
    kept = [schema for schema in schemas if schema is not False]
    if not kept:
        return False
    return kept[0] if len(kept) == 1 else {"anyOf": kept}


def _other_types(*types: str) -> Schema:
    """Numbers that are not whole cannot be told apart from whole ones."""
    taken = {"number" if type_ == "integer" else type_ for type_ in types}
    left = [type_ for type_ in _TYPES if type_ not in taken]
    return {"type": left} if left else False


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    kinds = ((bool, "boolean"), (int, "number"), (float, "number"), (str, "string"), (Mapping, "object"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "array")


def _children(schema: Mapping[str, Any]) -> Iterable[Schema]:
    for keyword, value in schema.items():
        if keyword in _ONE or (keyword in _SEVERAL and isinstance(value, list)):
            yield from value if isinstance(value, list) else [value]
        elif keyword in _NAMED and isinstance(value, Mapping):
            yield from value.values()


def _unsupported(keyword: str) -> ConstraintError:
    return ConstraintError(f"the schema has {keyword} in a way that is not supported", hint="say it without")
