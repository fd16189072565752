"""Requests made up from the server's own schema: none ends with 5xx, all are answered as it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from serve.process import ServerProcess, serving

pytest.importorskip("fastserve._native")

NAME = "stories"
CHECKED = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
POSTED = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/embeddings",
    "/v1/score",
    "/v1/rerank",
    "/v1/classify",
    "/v1/token-classify",
    "/v1/relations",
    "/v1/answer",
    "/tokenize",
    "/detokenize",
    "/apply-template",
)
GOT = ("/v1/models", "/v1/models/{model}", "/health/live", "/health/ready", "/metrics")
KEPT = (
    ("GET", "/v1/responses/{response_id}"),
    ("DELETE", "/v1/responses/{response_id}"),
    ("POST", "/v1/responses/{response_id}/cancel"),
)


@pytest.fixture(scope="module")
def server(stories_for_chat: Path, tmp_path_factory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("serve") / "log"
    options = ("--threads", "1", "--context-length", "64", "--kv-memory", "1MiB")
    with serving(stories_for_chat, log, *options) as server:
        yield server
        assert httpx.get(f"{server.url}/health/ready").status_code == 200
        assert not [line for line in server.log if line["level"] == "error"]


@pytest.fixture(scope="module")
def schema(server: ServerProcess) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def make_up_requests(schema: Any, method: str, path: str, mode: GenerationMode, num: int) -> None:
    @settings(
        max_examples=num,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = NAME  # else hardly any would get past it
        if "{model}" in path and mode is GenerationMode.POSITIVE:
            case.path_parameters["model"] = NAME
        case.validate_response(case.call(), checks=CHECKED)

    ask()


def test_the_schema_has_every_route(schema) -> None:
    assert set(schema) == {*POSTED, *GOT, *(path for _, path in KEPT)}


@pytest.mark.parametrize("path", POSTED)
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_made_up_bodies_get_what_the_schema_says(schema, path: str, mode: GenerationMode) -> None:
    make_up_requests(schema, "POST", path, mode, 15)


@pytest.mark.parametrize("path", GOT)
def test_made_up_addresses_get_what_the_schema_says(schema, path: str) -> None:
    make_up_requests(schema, "GET", path, GenerationMode.POSITIVE, 3)


@pytest.mark.parametrize(("method", "path"), KEPT)
def test_made_up_responses_are_not_found(schema, method: str, path: str) -> None:
    make_up_requests(schema, method, path, GenerationMode.POSITIVE, 5)


@pytest.mark.slow
@pytest.mark.parametrize("path", POSTED)
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_many_made_up_bodies_get_what_the_schema_says(schema, path: str, mode: GenerationMode) -> None:
    make_up_requests(schema, "POST", path, mode, 500)
