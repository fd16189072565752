"""Completions follow their constraints, whatever else happens to their sequences."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
from fake_executable import FakeExecutable, LetterDecoder, copied_token, hashed_token, make_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from letter_vocabulary import EOS, letter_compiler

from fastserve.config import ScheduleOptions
from fastserve.constraint import (
    ANY_OBJECT,
    MAX_CONSTRAINT_CHARACTERS,
    Choice,
    Constraint,
    Grammar,
    JsonSchema,
    Regex,
)
from fastserve.engine import guide as guide_module
from fastserve.engine.completion import Completion
from fastserve.engine.cost import OnlineStepCost, StepCost
from fastserve.engine.engine import Engine
from fastserve.engine.narrow import narrow_schema
from fastserve.engine.verification_cost import VerificationCost
from fastserve.errors import ConstraintError, OptionError
from fastserve.types import Limits, SamplingParams
from random_walk import byte_compiler, draw_texts

COMPILER = letter_compiler()


def add(engine: Engine, prompt: list[int], params: SamplingParams) -> int:
    assert params.constraint is not None
    return engine.add(prompt, params, guide=COMPILER.compile(params.constraint))


def finish(engine: Engine) -> dict[tuple[int, int], Completion]:
    done = {}
    while engine.has_work:
        chunks = engine.step()
        engine.check_invariants()
        done |= {(c.request_id, c.index): c.completion for c in chunks if c.completion is not None}
    return done


def complete(params: SamplingParams, prompt: list[int] | None = None, **options: object) -> Completion:
    engine = make_engine(eos_token_ids=(EOS,), **options)
    add(engine, prompt or [1, 2, 3], params)
    return finish(engine)[0, 0]


# What completions come to


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        (Regex("[xyz]{3}q*w"), "[xyz]{3}q*w"),
        (Choice(["alpha", "beta", "alphabet"]), "alpha|beta|alphabet"),
        (Grammar('start: "a" start "b" | "c"'), "a*cb*"),
    ],
    ids=["regex", "choice", "grammar"],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_is_what_the_constraint_says(
    constraint: Constraint, pattern: str, temperature: float
) -> None:
    for seed in range(20):
        completion = complete(
            SamplingParams(constraint=constraint, temperature=temperature, seed=seed, max_tokens=100),
            prompt=[seed, 5],
        )
        assert completion.finish_reason == "stop"
        assert re.fullmatch(pattern, completion.text)


def test_it_ends_without_an_end_token_where_nothing_may_follow() -> None:
    completion = complete(SamplingParams(constraint=Regex("abc")))
    assert (completion.text, completion.finish_reason) == ("abc", "stop")
    assert completion.completion_tokens == 3


def test_the_end_token_comes_only_where_the_text_is_whole() -> None:
    def ending(context: list[int], temperature: float, seed: int, draw: int) -> int:
        return EOS

    params = SamplingParams(constraint=Regex("(ab)+"))
    assert complete(params, next_token=ending).text == "ab"


def test_a_completion_that_is_cut_short_may_be_incomplete() -> None:
    completion = complete(SamplingParams(constraint=Regex("abcdef"), max_tokens=4))
    assert (completion.text, completion.finish_reason) == ("abcd", "length")


def test_a_stop_string_ends_it_before() -> None:
    completion = complete(SamplingParams(constraint=Regex("abcdef"), stop=["d"]))
    assert (completion.text, completion.finish_reason) == ("abc", "stop")


def test_a_stop_token_ends_it_where_the_grammar_has_it() -> None:
    completion = complete(SamplingParams(constraint=Regex("abcdef"), stop_token_ids=list(range(3, 97, 26))))
    assert (completion.text, completion.finish_reason) == ("abc", "stop")


def test_the_tokens_are_those_of_the_model_among_the_allowed_ones() -> None:
    """Where the model's choice is allowed, it is taken."""
    prompt, params = [4, 8], SamplingParams(constraint=Regex("[a-z]{20}"))
    expected = list(prompt)
    for draw in range(20):
        token_id = hashed_token(expected, 0.0, 0, draw)
        expected.append(token_id if token_id != EOS else 0)
    assert list(complete(params, prompt=prompt).token_ids) == expected[2:]


def test_ignoring_the_end_contradicts_a_constraint() -> None:
    with pytest.raises(OptionError, match="ignore_eos=True contradicts a constraint"):
        SamplingParams(constraint=ANY_OBJECT, ignore_eos=True)


def test_a_constraint_that_the_vocabulary_cannot_write_ends_with_an_error() -> None:
    completion = complete(SamplingParams(constraint=Regex("ab[0-9]+")))
    assert (completion.text, completion.finish_reason) == ("ab", "error")
    assert "its constraint cannot be followed further" in (completion.error or "")


# Beside others


constraints = st.sampled_from(
    [Regex("[ab]{1,12}c"), Regex("(xy|z){2,9}"), Choice(["quick", "quiet", "fox"]), None]
)
requests = st.lists(
    st.tuples(
        st.lists(st.integers(0, 96), min_size=1, max_size=20),
        st.builds(
            SamplingParams,
            constraint=constraints,
            temperature=st.sampled_from([0.0, 1.0]),
            seed=st.integers(0, 9),
            max_tokens=st.integers(1, 20),
            n=st.integers(1, 3),
            logprobs=st.sampled_from([None, 2]),
        ),
    ),
    min_size=1,
    max_size=6,
)


def content(completion: Completion) -> tuple[object, ...]:
    return completion.text, completion.token_ids, completion.finish_reason, completion.logprobs


@settings(max_examples=60, deadline=None)
@given(
    requests,
    st.sampled_from(["off", "prompt-lookup"]),
    st.integers(12, 40),
    st.sampled_from(["fcfs", "mlfq"]),
)
def test_a_crowd_with_preemption_and_speculation_changes_nothing(
    crowd: list[tuple[list[int], SamplingParams]], speculation: str, num_blocks: int, policy: str
) -> None:
    options = ScheduleOptions(policy=policy, speculation=speculation)
    engine = make_engine(
        eos_token_ids=(EOS,), options=options, num_blocks=num_blocks, next_token=copied_token, max_outputs=12
    )
    if engine.scheduler._speculator is not None:
        engine.scheduler._speculator._cost = _FreeDrafts(OnlineStepCost(StepCost(fixed_seconds=0.01)))
    ids = {
        engine.add(
            prompt, params, guide=None if params.constraint is None else COMPILER.compile(params.constraint)
        ): (prompt, params)
        for prompt, params in crowd
    }
    for (request_id, index), completion in finish(engine).items():
        prompt, params = ids[request_id]
        single = make_engine(eos_token_ids=(EOS,), next_token=copied_token)
        guide = None if params.constraint is None else COMPILER.compile(params.constraint)
        single.add(prompt, params, guide=guide)
        assert content(completion) == content(finish(single)[0, index])


class _FreeDrafts(VerificationCost):
    def observe(self, work: object, seconds: float) -> None:
        pass


def test_drafts_of_a_constrained_sequence_are_accepted_and_never_break_it() -> None:
    limits = Limits(max_tokens=32, max_outputs=12, max_sequences=4, num_blocks=64, max_context=128)
    engine = Engine(
        FakeExecutable(limits, next_token=copied_token),
        eos_token_ids=(EOS,),
        make_decoder=LetterDecoder,
        context_length=128,
        options=ScheduleOptions(speculation="prompt-lookup"),
    )
    assert engine.scheduler._speculator is not None
    engine.scheduler._speculator._cost = _FreeDrafts(OnlineStepCost(StepCost(fixed_seconds=0.01)))
    params = SamplingParams(constraint=Regex("[a-m]{60}"), max_tokens=80)
    add(engine, [i % 9 for i in range(30)], params)
    (completion,) = finish(engine).values()
    assert re.fullmatch("[a-m]{60}", completion.text)
    assert engine.scheduler.speculation.accepted_tokens > 5


# Masks


def test_masks_behind_drafts_are_those_that_come_if_the_drafts_are_right() -> None:
    guide = byte_compiler().compile(Regex("ab(c|de)f"))
    drafts = list(b"abd")
    assert guide.num_fitting(list(b"abdx")) == 3
    ahead = np.zeros((4, 9), np.uint32)
    guide.fill_masks(ahead, drafts)
    for row in range(4):
        now = np.zeros((1, 9), np.uint32)
        guide.fill_masks(now)
        assert now[0].tolist() == ahead[row].tolist()
        if row < 3:
            guide.advance(drafts[row])


def test_an_end_token_does_not_fit_as_a_draft() -> None:
    guide = byte_compiler().compile(Regex("a*"))
    assert guide.num_fitting([97, 97, 256, 97]) == 2


def test_a_compiled_constraint_is_kept_and_its_guides_are_independent() -> None:
    compiler = byte_compiler()
    first, second = compiler.compile(Regex("ab")), compiler.compile(Regex("ab"))
    first.advance(ord("a"))
    first.advance(ord("b"))
    assert first.is_over
    assert not second.is_over
    assert second.num_fitting(list(b"ab")) == 2


# What is refused


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (
            JsonSchema({"$ref": "http://example.org/x"}),
            "refers to 'http://example.org/x', which is not within it",
        ),
        (JsonSchema({"$ref": "#/$defs/x"}), "refers to '#/\\$defs/x', which is not there"),
        (
            JsonSchema({"type": "array", "uniqueItems": True}),
            "has uniqueItems in a way that is not supported",
        ),
        (JsonSchema({"type": "text"}), "the schema cannot be compiled: Invalid type: text"),
        (JsonSchema({"type": "string", "not": 5, "if": 3, "then": {}}), "not supported: .*not"),
        (JsonSchema(False), "the schema cannot be compiled: Unsatisfiable"),
        (JsonSchema({"type": "object", "properties": 5}), "the schema cannot be compiled"),
        (JsonSchema({"type": "string", "pattern": "(?=a)b"}), "the schema cannot be compiled"),
        (Regex("(?=a)b"), "the pattern cannot be compiled: .*look"),
        (Regex("a)"), "the pattern cannot be compiled"),
        (Grammar("start: foo"), 'the grammar cannot be compiled: .*unknown name: "foo"'),
        (Grammar("begin: /a/"), "the grammar cannot be compiled"),
    ],
    ids=str,
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(constraint: Constraint, message: str) -> None:
    with pytest.raises(ConstraintError, match=message):
        byte_compiler().compile(constraint)


def test_a_constraint_that_is_too_large_is_refused_with_its_size() -> None:
    with pytest.raises(
        ConstraintError, match=rf"has \d+ characters; the limit is {MAX_CONSTRAINT_CHARACTERS}"
    ):
        JsonSchema({"enum": ["x" * MAX_CONSTRAINT_CHARACTERS]})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JsonSchema({"a": {1, 2}}), "the schema is not JSON"),
        (lambda: JsonSchema({"minimum": float("nan")}), "the schema is not JSON"),
        (lambda: JsonSchema([1]), "is not a JSON schema"),  # type: ignore[arg-type]
        (lambda: Choice([]), "are not texts to choose from"),
        (lambda: Choice("yes"), "are not texts to choose from"),
        (lambda: Choice(["yes", ""]), "are not texts to choose from"),
        (lambda: Regex(""), "the pattern is empty"),
        (lambda: Grammar(" "), "the grammar is empty"),
        (lambda: SamplingParams(constraint="a+"), "constraint='a\\+' is not a JsonSchema"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_constraint_is_refused(make: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: JsonSchema({"title": "a\ud800"}), "schema"),
        (lambda: JsonSchema({"const": "\udfff"}), "schema"),
        (lambda: JsonSchema({"type": "string", "pattern": "\ud800+"}), "schema"),
        (lambda: JsonSchema({"properties": {"\ud800": True}}), "schema"),
        (lambda: JsonSchema(json.loads('{"enum": [["\\ud800"]]}')), "schema"),
        (lambda: Regex("a\ud800"), "pattern"),
        (lambda: Choice(["yes", "\ud800"]), "choice"),
        (lambda: Grammar('start: "\ud800"'), "grammar"),
    ],
    ids=["title", "const", "pattern", "name", "parsed", "regex", "choice", "grammar"],
)
def test_half_of_a_surrogate_pair_is_refused_by_name(make: Callable[[], Constraint], name: str) -> None:
    with pytest.raises(ConstraintError, match=rf"the {name} is not valid Unicode: it has '\\ud[8f][0f][0f]'"):
        make()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["minimum", "const", "enum", "default", "x-of-nobody"])
def test_what_is_no_number_of_json_is_refused(number: float, place: str) -> None:
    with pytest.raises(ConstraintError, match="the schema is not JSON"):
        JsonSchema({"properties": {"a": {place: [number] if place == "enum" else number}}})


def test_a_number_that_is_too_large_for_a_float_is_refused() -> None:
    with pytest.raises(ConstraintError, match="the schema is not JSON"):
        JsonSchema(json.loads('{"maximum": 1e999}'))


def test_a_schema_is_narrowed_while_others_may_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    def note(schema: object) -> object:
        held.append(guide_module._DEEP_STACK.locked())
        return narrow_schema(schema)

    monkeypatch.setattr(guide_module, "narrow_schema", note)
    guide_module.supported_schema(JsonSchema({"not": {"type": "array"}}))
    assert held == [False]


def chain_of_rules(length: int) -> str:
    return "\n".join(["start: r0", *(f"r{i}: r{i + 1}" for i in range(length)), f'r{length}: "a"'])


def chain_of_references(length: int) -> JsonSchema:
    definitions: dict[str, object] = {
        f"a{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}, "required": ["x"]}
        for i in range(length)
    }
    return JsonSchema({"$ref": "#/$defs/a0", "$defs": {**definitions, f"a{length}": {"type": "string"}}})


@pytest.mark.parametrize(
    "constraint", [Grammar(chain_of_rules(8000)), chain_of_references(1200)], ids=["rules", "references"]
)
def test_a_grammar_as_deep_as_it_may_be_long_does_not_end_the_process(constraint: Constraint) -> None:
    guide = byte_compiler().compile(constraint)
    assert guide.num_fitting([0]) == 0


def test_a_constraint_that_becomes_too_complex_ends_its_completion_alone() -> None:
    complex_one = Regex("xyz" + "(a|b?)" * 500)
    engine = make_engine(eos_token_ids=(EOS,))
    failing = add(engine, [1, 2], SamplingParams(constraint=complex_one, max_tokens=20))
    fine = add(engine, [3, 4], SamplingParams(constraint=Regex("abc")))
    done = finish(engine)
    assert done[failing, 0].finish_reason == "error"
    assert done[failing, 0].text == "xyz"
    assert "its constraint cannot be followed further" in (done[failing, 0].error or "")
    assert done[fine, 0].text == "abc"


def test_an_object_of_too_many_properties_is_refused_at_once() -> None:
    properties = {f"property{index}": True for index in range(1500)}
    with pytest.raises(ConstraintError, match=r"cannot be compiled: .* items; max is"):
        byte_compiler().compile(JsonSchema({"type": "object", "properties": properties}))


# JSON


def test_json_is_written_as_programs_print_it() -> None:
    """One space, or a line with its indentation: a model cannot fill its context with space."""
    guide = byte_compiler().compile(ANY_OBJECT)
    assert guide.num_fitting(list(b'{"a": 1}')) == 8
    assert guide.num_fitting(list(b'{\n    "a": 1\n}')) == 14
    assert guide.num_fitting(list(b"{  ")) == 2
    assert guide.num_fitting(list(b"{\n\n")) == 2


def test_keys_come_in_the_order_of_the_schema() -> None:
    schema = JsonSchema(
        {
            "type": "object",
            "properties": {"b": {"type": "integer"}, "a": {"type": "boolean"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        }
    )
    texts = draw_texts(schema, count=10)
    assert texts
    assert all(list(json.loads(text)) == ["b", "a"] for text in texts)
