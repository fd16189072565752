"""What routes tell the engine of the requests that come by them."""

from __future__ import annotations

from typing import Any

import pytest

from serve.conftest import STORIES

pytest.importorskip("fastserve._native")

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["The dog", "He"], "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 2}),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 2}),
    ],
)
def test_the_engine_is_told_by_which_endpoint_a_request_came(server, monkeypatch, path, body) -> None:
    submit, endpoints = server.llm.submit, []

    async def note(*arguments: Any, endpoint: str, **options: Any) -> Any:
        endpoints.append(endpoint)
        return await submit(*arguments, endpoint=endpoint, **options)

    monkeypatch.setattr(server.llm, "submit", note)
    response = server.post(path, {"model": STORIES, **body})
    assert response.status_code == 200, response.text
    assert endpoints == [path] * len(body.get("prompt", [None]))
