"""/v1/completions in this process, against LLM on the same model."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from fastserve import LLM, SamplingParams
from serve.conftest import STORIES, events

pytest.importorskip("fastserve._native")

PATH = "/v1/completions"
BASE = {"model": STORIES, "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def llm(stories) -> Iterator[LLM]:
    with LLM(stories, threads=1) as llm:
        yield llm


def texts_of(response, num: int) -> list[str]:
    *data, done = events(response)
    assert done == "[DONE]"
    texts = [""] * num
    for text in data:
        for choice in json.loads(text)["choices"]:
            texts[choice["index"]] += choice["text"]
    return texts


def test_a_completion_is_that_of_llm(server, llm) -> None:
    params = {
        "temperature": 0.9,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.01,
        "seed": 5,
        "presence_penalty": 0.5,
    }
    more = {"frequency_penalty": 0.2, "repetition_penalty": 1.1, "logit_bias": {"300": -100.0}}
    response = server.post(PATH, {**BASE, **params, **more, "prompt": "The dog"})
    assert response.status_code == 200, response.text
    expected = llm.generate(
        "The dog",
        SamplingParams(
            max_tokens=12, **params, frequency_penalty=0.2, repetition_penalty=1.1, logit_bias={300: -100.0}
        ),
    )
    assert response.json()["choices"][0]["text"] == expected[0].text


def test_prompts_of_one_request_are_answered_in_their_order_as_alone(server, llm) -> None:
    prompts = ["The dog", "Once upon a time", "He"]
    whole = server.post(PATH, {**BASE, "prompt": prompts, "n": 2, "temperature": 1, "seed": 3})
    choices = whole.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    params = SamplingParams(max_tokens=12, temperature=1, seed=3, n=2)
    expected = [completion.text for p in prompts for completion in llm.generate(p, params)]
    assert [choice["text"] for choice in choices] == expected
    streamed = server.post(
        PATH, {**BASE, "prompt": prompts, "n": 2, "temperature": 1, "seed": 3, "stream": True}
    )
    assert texts_of(streamed, 6) == expected


def test_token_ids_are_a_prompt_and_echo_gives_the_prompt_back(server) -> None:
    tokens = server.post("/tokenize", {"model": STORIES, "prompt": "The dog"}).json()["tokens"]
    by_ids = server.post(PATH, {**BASE, "prompt": tokens}).json()
    by_text = server.post(PATH, {**BASE, "prompt": "The dog"}).json()
    assert by_ids["choices"][0]["text"] == by_text["choices"][0]["text"]
    assert by_ids["usage"] == by_text["usage"]
    echoed = server.post(PATH, {**BASE, "prompt": "The dog", "echo": True}).json()
    assert echoed["choices"][0]["text"] == "The dog" + by_text["choices"][0]["text"]
    streamed = server.post(PATH, {**BASE, "prompt": "The dog", "echo": True, "stream": True})
    assert texts_of(streamed, 1) == [echoed["choices"][0]["text"]]


def test_logprobs_have_each_token_with_its_place_in_the_text(server, llm) -> None:
    choice = server.post(PATH, {**BASE, "prompt": "The dog", "logprobs": 2}).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)
    (expected,) = llm.generate("The dog", SamplingParams(max_tokens=12, logprobs=2))
    assert expected.logprobs is not None
    assert logprobs["token_logprobs"] == pytest.approx([lp.logprob for lp in expected.logprobs], abs=1e-4)
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])
    streamed = server.post(PATH, {**BASE, "prompt": "The dog", "logprobs": 2, "stream": True})
    tokens = [
        token
        for data in events(streamed)[:-1]
        for choice in json.loads(data)["choices"]
        for token in choice["logprobs"]["tokens"]
    ]
    assert tokens == logprobs["tokens"]


def test_sixteen_tokens_are_the_default_and_ignore_eos_goes_on(server) -> None:
    body = {"model": STORIES, "prompt": "He", "temperature": 0, "ignore_eos": True}
    assert server.post(PATH, body).json()["usage"]["completion_tokens"] == 16


def test_a_request_that_is_refused_is_refused_whole(server) -> None:
    response = server.post(PATH, {**BASE, "prompt": ["He", "a" * 5000]})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_a_prompt_is_echoed_with_its_logprobs_whole_and_streamed_alike(server, llm) -> None:
    body = {**BASE, "prompt": ["The dog ran home.", "He"], "echo": True, "logprobs": 1, "n": 2, "seed": 2}
    whole = server.post(PATH, body).json()["choices"]
    (alone, _) = llm.generate(
        "The dog ran home.", SamplingParams(max_tokens=12, n=2, seed=2, logprobs=1, prompt_logprobs=1)
    )
    logprobs = whole[0]["logprobs"]
    known = [*alone.prompt_logprobs, *alone.logprobs]
    assert logprobs["token_logprobs"] == [None, *(pytest.approx(lp.logprob, abs=1e-4) for lp in known)]
    assert logprobs["top_logprobs"][0] is None
    assert whole[0]["text"] == "The dog ran home." + alone.text
    streamed: list[dict[str, list]] = [{} for _ in whole]
    for data in events(server.post(PATH, {**body, "stream": True}))[:-1]:
        for choice in json.loads(data)["choices"]:
            for name, values in (choice["logprobs"] or {}).items():
                streamed[choice["index"]].setdefault(name, []).extend(values)
    assert streamed == [choice["logprobs"] for choice in whole]
    for choice in whole:
        tokens = zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True)
        rest = [(token, offset) for token, offset in tokens if offset > 0]
        assert all(choice["text"][offset:].startswith(token) for token, offset in rest)


def test_prompt_logprobs_are_told_by_token(server) -> None:
    tokens = server.post("/tokenize", {"model": STORIES, "prompt": "The dog ran."}).json()["tokens"]
    body = {**BASE, "prompt": tokens, "prompt_logprobs": 2}
    choice = server.post(PATH, body).json()["choices"][0]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    assert [str(token) in entry for token, entry in zip(tokens[1:], others, strict=True)] == [True] * len(
        others
    )
    assert all(2 <= len(entry) <= 3 for entry in others)
    assert choice["logprobs"] is None
    streamed = [json.loads(data) for data in events(server.post(PATH, {**body, "stream": True}))[:-1]]
    assert streamed[0]["choices"][0]["prompt_logprobs"] == choice["prompt_logprobs"]


def test_offsets_count_the_texts_characters_where_tokens_are_parts_of_one(server) -> None:
    """Bytes of characters, one a token: each adds nothing, or what it completes."""
    body = {"model": STORIES, "prompt": "é", "max_tokens": 8, "temperature": 0, "logprobs": 0}
    ids = server.post("/tokenize", {"model": STORIES, "prompt": "語語"}).json()["tokens"]
    biased = {**body, "logit_bias": {str(token_id): 100 for token_id in ids[-3:]}, "seed": 1}
    (choice,) = server.post("/v1/completions", {**biased, "temperature": 1.0}).json()["choices"]
    *_, last = choice["logprobs"]["text_offset"]
    assert last <= len(choice["text"])
    assert choice["logprobs"]["text_offset"] == sorted(choice["logprobs"]["text_offset"])


@pytest.mark.parametrize("logprobs", [{}, {"logprobs": 0}, {"logprobs": 2}, {"prompt_logprobs": 1}])
def test_a_prompt_is_scored_without_a_completion_whole_and_streamed_alike(server, logprobs) -> None:
    body = {**BASE, "prompt": ["The dog ran home.", "He"], "echo": True, "n": 2, **logprobs}
    counted = server.get("/metrics").text
    scored = server.post(PATH, {**body, "max_tokens": 0})
    assert scored.status_code == 200, scored.text
    going_on = server.post(PATH, {**body, "max_tokens": 1}).json()
    choices = scored.json()["choices"]
    assert [choice["text"] for choice in choices] == ["The dog ran home."] * 2 + ["He"] * 2
    assert [choice["finish_reason"] for choice in choices] == ["length"] * 4
    num_tokens = going_on["usage"]["prompt_tokens"]
    assert scored.json()["usage"] == {
        "prompt_tokens": num_tokens,
        "completion_tokens": 0,
        "total_tokens": num_tokens,
    }
    for choice, longer in zip(choices, going_on["choices"], strict=True):
        assert choice.get("prompt_logprobs") == longer.get("prompt_logprobs")
        if "logprobs" in logprobs:
            assert choice["logprobs"] == {name: values[:-1] for name, values in longer["logprobs"].items()}
        else:
            assert choice["logprobs"] is None
    streamed = server.post(PATH, {**body, "max_tokens": 0, "stream": True})
    joined = [{"text": ""} for _ in choices]
    for data in events(streamed)[:-1]:
        for choice in json.loads(data)["choices"]:
            joined[choice["index"]]["text"] += choice["text"]
            known = {name: value for name, value in choice.items() if name != "text" and value is not None}
            joined[choice["index"]] |= known
    assert joined == [{name: value for name, value in c.items() if value is not None} for c in choices]
    count = 'fastserve_completion_tokens_total{model="stories"} '
    before, after = (
        float(text.split(count)[1].split()[0]) if count in text else 0.0
        for text in (counted, server.get("/metrics").text)
    )
    assert after - before == going_on["usage"]["completion_tokens"]


def test_without_echo_no_tokens_are_refused_by_name(server) -> None:
    for more in ({}, {"logprobs": 1}, {"echo": False}):
        response = server.post(PATH, {**BASE, "prompt": "He", "max_tokens": 0, **more})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "max_tokens"
    scored = server.post(PATH, {**BASE, "prompt": "He", "max_tokens": 0, "prompt_logprobs": 0}).json()
    (choice,) = scored["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "length")
    assert len(choice["prompt_logprobs"]) == scored["usage"]["prompt_tokens"]
