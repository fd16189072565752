"""Writes a JSON schema without the keywords that the compiler of constraints lacks.

What the new schema accepts the old one accepts too; the reverse need not hold. Where several schemas apply
to one value it makes alternatives of them, each a conjunction: what an alternative evaluates is then known,
as `unevaluatedProperties` asks, and a negation is a matter of single keywords. Keywords: JSON Schema draft
2020-12, core and validation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from fastserve.engine.narrow_budget import NarrowBudget
from fastserve.engine.schema_keyword import NAMED, ONE, SEVERAL, Schema
from fastserve.engine.schema_references import SchemaReferences
from fastserve.errors import ConstraintError

_MOST_ALTERNATIVES = 256  # of one value
_MOST_NESTED = 32  # references that apply to one value, and negations

_TYPES = ("null", "boolean", "object", "array", "number", "string")
# What the compiler lacks, or does not always have.
_REWRITTEN = (
    "not", "if", "dependentRequired", "dependentSchemas", "unevaluatedProperties", "unevaluatedItems",
    "contains", "propertyNames", "uniqueItems", "oneOf",
)  # fmt: skip


def narrow_schema(schema: Schema) -> Schema:
    """
    Raises:
        ConstraintError: a keyword, or a reference, that cannot be rewritten; or the new schema would be too
            large.
    """
    budget = NarrowBudget()
    targets = SchemaReferences(schema, budget)
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
    budget: NarrowBudget
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
            if keyword in ONE:
                narrowed[keyword] = self.narrow(value)
            elif keyword in SEVERAL:
                narrowed[keyword] = [self.narrow(item) for item in value]
            elif keyword in NAMED:
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


def _unsupported(keyword: str) -> ConstraintError:
    return ConstraintError(f"the schema has {keyword} in a way that is not supported", hint="say it without")
