"""A real model follows the schemas of the JSON Schema test suite."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from fastserve.config import EngineOptions
from fastserve.constraint import Choice, Grammar, JsonSchema, Regex
from fastserve.engine.async_llm import AsyncLLM
from fastserve.engine.llm import LLM
from fastserve.errors import ConstraintError
from fastserve.types import SamplingParams

pytest.importorskip("fastserve._native")

MAX_TOKENS = 120


@pytest.fixture(scope="module")
def llm(model_dir: Callable[[str], Path]) -> Iterator[LLM]:
    with LLM(model_dir("smollm2-135m-instruct"), weights="int8", context_length=2048) as model:
        yield model


def suite(folder: Path) -> dict[str, Any]:
    """The schemas of the test suite, except those that Python's validator cannot judge: its regular
    expressions have no \\p."""
    groups = {
        f"{path.stem}: {group['description']}": group["schema"]
        for path in sorted((folder / "schema_testsuite_2020_12").glob("*.json"))
        for group in json.loads(path.read_text(encoding="utf-8"))
    }
    return {name: schema for name, schema in groups.items() if "\\p{" not in json.dumps(schema)}


def split(llm: LLM, schemas: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The schemas that can be followed, and why others cannot."""
    followed, refused = {}, []
    for name, schema in schemas.items():
        try:
            llm._constraints.compile(JsonSchema(schema))  # type: ignore[union-attr]
            followed[name] = schema
        except ConstraintError as error:
            refused.append(f"{name}: {error}")
    return followed, refused


def complete(llm: LLM, schemas: dict[str, Any], *, seed: int) -> set[str]:
    """The names of the schemas whose completions are whole, which all are valid."""
    task = "Write a short JSON value that is valid for this JSON schema, nothing else: "
    prompts = [
        llm.chat_prompt([{"role": "user", "content": task + json.dumps(schema)[:500]}])
        for schema in schemas.values()
    ]
    params = [
        SamplingParams(constraint=JsonSchema(schema), temperature=0.8, seed=seed, max_tokens=MAX_TOKENS)
        for schema in schemas.values()
    ]
    whole = set()
    for name, completion in zip(schemas, llm.generate(prompts, params), strict=True):
        completion.checked()
        if completion.finish_reason == "stop":
            whole.add(name)
            validator = jsonschema.Draft202012Validator(schemas[name])
            assert validator.is_valid(json.loads(completion.text)), (name, completion.text)
    return whole


def test_completions_of_a_dozen_schemas_are_valid(llm: LLM, shared_data: Path) -> None:
    followed, _ = split(llm, dict(list(suite(shared_data).items())[::30]))
    assert len(complete(llm, followed, seed=1)) >= 4


@pytest.mark.slow
def test_completions_of_three_hundred_schemas_are_valid(llm: LLM, shared_data: Path) -> None:
    """Those that are not whole after so many tokens are tried again with another seed."""
    followed, refused = split(llm, suite(shared_data))
    assert len(followed) >= 320, refused
    left = dict(followed)
    for seed in range(8):
        whole = complete(llm, left, seed=seed)
        left = {name: schema for name, schema in left.items() if name not in whole}
    assert len(followed) - len(left) >= 300, list(left)


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "city": {"enum": ["Paris", "Rome"]},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}


def test_a_chat_answers_in_json(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Tom is 30 and lives in Rome. Give name, age and city as JSON."}]
    answer = llm.chat(messages, SamplingParams(constraint=JsonSchema(PERSON), max_tokens=100))
    assert answer.finish_reason == "stop"
    assert json.loads(answer.text) == {"name": "Tom", "age": 30, "city": "Rome"}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_constrained_completion_is_the_same_alone_and_in_a_crowd(llm: LLM, temperature: float) -> None:
    constraints = [JsonSchema(PERSON), Regex(r"\d{3}-\d{4}"), Choice(["Paris", "Rome"]), None] * 3
    prompts = [f"Number {index} is" for index in range(len(constraints))]
    params = [
        SamplingParams(constraint=c, temperature=temperature, seed=index, max_tokens=40, logprobs=2)
        for index, c in enumerate(constraints)
    ]
    together = llm.generate(prompts, params)
    for prompt, one, crowded in zip(prompts, params, together, strict=True):
        (alone,) = llm.generate(prompt, one)
        assert (alone.token_ids, alone.text, alone.logprobs) == (
            crowded.token_ids,
            crowded.text,
            crowded.logprobs,
        )


def test_a_constraint_holds_on_every_backend(stories: Path, backend: str) -> None:
    params = [
        SamplingParams(constraint=Regex("[a-f]{5}( [0-9]{1,3})?!"), temperature=t, seed=s, max_tokens=60)
        for t, s in ((0.0, 0), (1.0, 1), (2.0, 2))
    ]
    with LLM(stories, backend=backend, weights="f32") as model:  # type: ignore[arg-type]
        for completion in model.generate(["Once"] * 3, params):
            assert completion.finish_reason == "stop"
            assert re.fullmatch("[a-f]{5}( [0-9]{1,3})?!", completion.text)


def test_constraints_are_followed_by_a_loop_of_events(stories: Path) -> None:
    async def run() -> list[str]:
        async with AsyncLLM(stories, EngineOptions(weights="f32")) as model:
            params = SamplingParams(constraint=Choice(["red", "green"]), temperature=1.0, seed=1, n=3)
            with pytest.raises(ConstraintError, match="cannot be compiled"):
                await model.generate("Once", SamplingParams(constraint=Regex("(")))
            return [completion.text for completion in await model.generate("Once", params)]

    texts = asyncio.run(run())
    assert len(texts) == 3
    assert set(texts) <= {"red", "green"}


def test_special_tokens_come_where_a_grammar_demands_them(llm: LLM) -> None:
    token_id = llm.model.tokenizer.token_id("<|im_start|>")
    params = SamplingParams(
        constraint=Grammar(f'start: "a" <[{token_id}]> "b"'), skip_special_tokens=False, max_tokens=10
    )
    (completion,) = llm.generate("x", params)
    assert completion.text == "a<|im_start|>b"
    assert token_id in completion.token_ids
