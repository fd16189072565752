"""What a narrowed schema accepts, the schema accepts, by a validator of its own."""

from __future__ import annotations

import json
import logging
import re
import tracemalloc
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from fastserve.constraint import MAX_CONSTRAINT_CHARACTERS, JsonSchema
from fastserve.engine.narrow import narrow_schema
from fastserve.errors import ConstraintError
from random_walk import draw_texts

STRING, NUMBER = {"type": "string"}, {"type": "number"}


def texts_of(schema: Any, *, count: int = 30) -> list[Any]:
    return [json.loads(text) for text in draw_texts(JsonSchema(schema), count=count)]


@pytest.mark.parametrize(
    "schema",
    [
        {"not": {"type": ["integer", "object", "array", "string"]}},
        {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "not": {"required": ["a"]}},
        {"type": "integer", "not": {"minimum": 3}},
        {"type": "string", "maxLength": 5, "not": {"minLength": 3}},
        {
            "type": "object",
            "properties": {"kind": {"enum": ["a", "b"]}, "x": NUMBER, "y": STRING},
            "required": ["kind"],
            "additionalProperties": False,
            "if": {"properties": {"kind": {"type": "string", "maxLength": 1}}, "required": ["x"]},
            "then": {"required": ["y"]},
            "else": {"properties": {"y": False}},
        },
        {
            "type": "object",
            "properties": {"card": NUMBER, "address": STRING},
            "additionalProperties": False,
            "dependentRequired": {"card": ["address"]},
        },
        {
            "type": "object",
            "properties": {"a": NUMBER, "b": True},
            "additionalProperties": False,
            "dependentSchemas": {"a": {"properties": {"b": STRING}, "required": ["b"]}},
        },
        {"type": "array", "items": {"enum": [1, "x"]}, "contains": STRING, "maxItems": 3},
        {"items": {"enum": [1, "x"]}, "contains": STRING, "minContains": 2, "maxContains": 3},
        {"type": "object", "propertyNames": {"pattern": "^[ab]$"}, "additionalProperties": NUMBER},
        {"type": "object", "propertyNames": {"maxLength": 2}, "maxProperties": 2},
        {"type": "object", "propertyNames": {"enum": ["x", "y"]}},
        {
            "type": "object",
            "allOf": [{"properties": {"a": NUMBER}}],
            "anyOf": [{"properties": {"b": STRING}, "required": ["b"]}, {"properties": {"c": {"const": 1}}}],
            "unevaluatedProperties": False,
        },
        {
            "type": "array",
            "prefixItems": [STRING],
            "anyOf": [{"prefixItems": [True, NUMBER]}, True],
            "unevaluatedItems": False,
        },
        {"oneOf": [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 5}]},
        {
            "$dynamicRef": "#node",
            "$defs": {
                "node": {
                    "$dynamicAnchor": "node",
                    "type": "object",
                    "properties": {"next": {"$dynamicRef": "#node"}},
                    "additionalProperties": False,
                }
            },
        },
        {"type": "string", "format": "idn-email", "maxLength": 4},
        {"type": "array", "maxItems": 2.0, "items": {"type": "null"}},
        {"uniqueItems": True},
    ],
    ids=lambda schema: json.dumps(schema)[:60],
)
def test_what_is_written_is_valid_and_not_always_the_same(schema: Any) -> None:
    values = texts_of(schema, count=40)
    validator = jsonschema.Draft202012Validator(schema)
    for value in values:
        validator.validate(value)
    assert len({json.dumps(value) for value in values}) > 1


def test_a_schema_that_the_compiler_has_is_not_narrowed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        texts_of({"type": "object", "properties": {"narrow_not_this": STRING}}, count=1)
    assert not caplog.records


def test_narrowing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        texts_of({"not": {"type": "array", "minItems": 77}}, count=1)
    assert "a schema is narrowed" in caplog.text


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "array", "items": STRING, "uniqueItems": True}, "uniqueItems"),
        ({"propertyNames": {"format": "email"}}, "propertyNames"),
        ({"allOf": [{"$ref": "#"}], "unevaluatedProperties": False}, "refers to itself without end"),
        ({"not": {"$ref": "other.json"}}, "refers to 'other.json', which is not within it"),
        (
            {"not": STRING, "allOf": [{"anyOf": [{"minimum": i}, {"maximum": i}]} for i in range(9)]},
            "more than 256 alternatives",
        ),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_cannot_be_narrowed_is_refused_by_name(schema: Any, message: str) -> None:
    with pytest.raises(ConstraintError, match=re.escape(message)):
        narrow_schema(schema)


# What grows


def nested_one_of(depth: int) -> Any:
    """What it grows to multiplies by six with each level: from the fourth on it is too large."""
    schema: Any = {"not": {"const": "a"}}
    for _ in range(depth):
        schema = {
            "oneOf": [
                {"type": "object", "properties": {name: schema}, "required": [name]} for name in ("x", "y")
            ]
        }
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        nested_one_of(9),
        {"contains": STRING, "minContains": 10**9},
        {"not": {"prefixItems": [STRING] * 2000}},
        {"not": {"required": [f"property{index}" for index in range(4000)]}},
        {"oneOf": [True] * 2000},
        {"anyOf": [nested_one_of(3)] * 200},
        {"allOf": [{"if": {"enum": [*range(9000)]}, "then": {"minimum": 1}}] * 200},
        {
            "$ref": "#/$defs/a",
            "$defs": {"a": {"not": {"allOf": [{"not": {"$ref": "#/$defs/b"}}] * 9}}, "b": nested_one_of(6)},
        },
    ],
    ids=["oneOf", "minContains", "prefixItems", "required", "true", "anyOf", "if", "$ref"],
)
def test_what_grows_without_measure_is_refused_before_it_is_built(schema: Any) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ConstraintError, match=r"beyond 20000 nodes|256 alternatives|has \d+ characters"):
            narrow_schema(schema)
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_bytes < 50 * 2**20


def test_what_would_be_too_long_is_refused_before_it_is_written() -> None:
    with pytest.raises(ConstraintError, match=rf"has \d+ characters .*limit is {MAX_CONSTRAINT_CHARACTERS}"):
        narrow_schema(nested_one_of(5))


def test_what_grows_as_far_as_it_may_is_narrowed() -> None:
    text = json.dumps(narrow_schema(nested_one_of(3)))
    assert 50_000 < len(text) < MAX_CONSTRAINT_CHARACTERS


@pytest.mark.parametrize("keyword", ["not", "if"])
def test_a_document_as_large_as_it_may_be_is_within_the_budget(keyword: str) -> None:
    """With one place to narrow."""
    names = [f"p{index}" for index in range(2000)]
    schema = {
        "type": "object",
        "properties": {name: {"type": "string", "title": "A property"} for name in names},
        keyword: {"required": names[:1]},
        "then": {"required": names[1:2]},
    }
    assert len(narrow_schema(schema)) >= 1


# The suite's own schemas


def suite(folder: Path) -> list[tuple[str, Any]]:
    """(file and description, schema) of every group of the JSON Schema test suite, except those that Python's
    validator cannot judge: its regular expressions have no \\p."""
    groups = [
        (f"{path.stem}: {group['description']}", group["schema"])
        for path in sorted((folder / "schema_testsuite_2020_12").glob("*.json"))
        for group in json.loads(path.read_text(encoding="utf-8"))
    ]
    return [(name, schema) for name, schema in groups if "\\p{" not in json.dumps(schema)]


def check_suite(groups: list[tuple[str, Any]], *, count: int) -> tuple[int, list[str]]:
    """How many schemas have completions, all valid; and what is said of those that cannot be compiled."""
    num_written, refused = 0, []
    for name, schema in groups:
        try:
            values = texts_of(schema, count=count)
        except ConstraintError as error:
            refused.append(f"{name}: {error}")
            continue
        validator = jsonschema.Draft202012Validator(schema)
        broken = [value for value in values if not validator.is_valid(value)]
        assert not broken, name
        num_written += bool(values)
    return num_written, refused


def test_every_ninth_schema_of_the_suite_is_followed_or_refused(shared_data: Path) -> None:
    groups = suite(shared_data)[::9]
    num_written, refused = check_suite(groups, count=5)
    assert num_written + len(refused) == len(groups)
    assert num_written > 0.8 * len(groups)


@pytest.mark.slow
def test_more_than_three_hundred_schemas_of_the_suite_are_followed(shared_data: Path) -> None:
    num_written, refused = check_suite(suite(shared_data), count=30)
    assert num_written > 320
    assert not [reason for reason in refused if "cannot be followed" in reason]
