"""Requests of many prompts: taken in together, or not at all."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve.conftest import OPTIONS, STORIES

pytest.importorskip("fastserve._native")

PATH = "/v1/completions"


def num_steps(server) -> int:
    return sum(server.run(server.llm.status()).steps.num_sequences.counts)


def test_prompts_of_one_request_are_taken_in_together(make_server) -> None:
    server = make_server()
    body = {"model": STORIES, "prompt": ["He"] * 32, "max_tokens": 1}
    assert server.post(PATH, body).status_code == 200
    assert num_steps(server) < 16  # one by one, each would wait for a step of those before it


def test_where_one_prompt_is_refused_none_is_left(make_server) -> None:
    server = make_server(engine=replace(OPTIONS, max_waiting=3, max_sequences=1))
    body = {"model": STORIES, "prompt": ["He"] * 32, "max_tokens": 100, "ignore_eos": True}
    response = server.post(PATH, body)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
    status = server.run(server.llm.status())
    assert (status.num_waiting, status.num_resident, len(server.llm._streams)) == (0, 0, 0)
