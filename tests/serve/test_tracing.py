"""Spans of requests."""

from __future__ import annotations

import asyncio
import builtins
import logging
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from fastserve.errors import OptionError
from fastserve.serve.app import create_app
from fastserve.serve.options import ServeOptions
from fastserve.serve.tracing import Tracing
from serve.conftest import STORIES
from serve.process import serving

BODY = {"model": STORIES, "prompt": "He", "max_tokens": 5, "ignore_eos": True}
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


class TracedServer:
    """The application of another server, with spans that are kept."""

    def __init__(self, server) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        app = create_app([server.llm], ServeOptions(), tracing=Tracing(provider))
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60)
        self._server = server

    def post(self, path: str, body: object, **options: object) -> httpx.Response:
        return self._server.run(self.client.post(path, json=body, **options))

    def run(self, awaitable):
        return self._server.run(awaitable)

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())


@pytest.fixture
def traced(server) -> Iterator[TracedServer]:
    traced = TracedServer(server)
    yield traced
    traced.run(traced.client.aclose())


def test_a_span_tells_of_model_tenant_tokens_and_times(traced) -> None:
    response = traced.post("/v1/completions", {**BODY, "user": "ann", "n": 2})
    (span,) = traced.spans
    assert (span.name, span.kind, span.parent) == ("POST /v1/completions", SpanKind.SERVER, None)
    assert dict(span.attributes) == {
        "http.request.method": "POST",
        "url.path": "/v1/completions",
        "url.scheme": "http",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "fastserve.request_id": response.headers["x-request-id"],
        "fastserve.tenant": "ann",
        "gen_ai.request.model": STORIES,
        "gen_ai.usage.input_tokens": response.json()["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 10,
        "gen_ai.response.finish_reasons": ("length", "length"),
    }
    turn, token = span.events
    assert (turn.name, token.name) == ("first turn", "first token")
    assert span.start_time <= turn.timestamp < token.timestamp < span.end_time
    seconds = token.attributes["fastserve.time_to_first_token_seconds"]
    assert seconds == pytest.approx((token.timestamp - span.start_time) / 1e9, abs=1e-6)
    assert 0 <= turn.attributes["fastserve.queue_seconds"] < seconds
    assert span.status.status_code is StatusCode.UNSET


def test_a_span_goes_on_from_the_traceparent_of_its_client(traced, caplog) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}
    with caplog.at_level(logging.INFO, "fastserve.serve.request"):
        traced.post("/v1/completions", BODY, headers=headers)
    (span,) = traced.spans
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    assert caplog.records[-1].fields["trace_id"] == TRACE_ID


@pytest.mark.parametrize("traceparent", ["", "00-0-0-0", "\xff", "00-" + "f" * 500])
def test_a_traceparent_that_is_none_begins_a_trace_of_its_own(traced, traceparent: str) -> None:
    traced.post("/v1/completions", BODY, headers={"traceparent": traceparent.encode("latin-1")})
    (span,) = traced.spans
    assert span.parent is None
    assert span.context.trace_id


def test_what_is_refused_has_a_span_without_tokens(traced) -> None:
    traced.post("/v1/completions", {**BODY, "n": 0})
    traced.post("/nowhere", {})
    refused, lost = traced.spans
    assert (refused.name, refused.attributes["http.response.status_code"]) == ("POST /v1/completions", 400)
    assert (lost.name, lost.attributes["http.response.status_code"]) == ("POST", 404)
    for span in (refused, lost):
        assert "gen_ai.usage.output_tokens" not in span.attributes
        assert span.events == ()
        assert span.status.status_code is StatusCode.UNSET


def test_a_defect_of_ours_is_an_error_of_its_span(traced, server, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(type(server.app.state.service.models), "find", fail)
    traced.post("/v1/completions", BODY)
    (span,) = traced.spans
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "500"


def test_the_span_of_a_response_in_the_background_ends_with_it(traced) -> None:
    async def main() -> None:
        body = {"model": STORIES, "input": "He", "background": True, "max_output_tokens": 100}
        response = (await traced.client.post("/v1/responses", json=body)).json()
        assert response["status"] == "in_progress"
        assert not traced.spans
        while response["status"] == "in_progress":
            await asyncio.sleep(0.01)
            response = (await traced.client.get(f"/v1/responses/{response['id']}")).json()
        while not (ended := [span for span in traced.spans if span.name == "POST /v1/responses"]):
            await asyncio.sleep(0.01)
        assert ended[0].attributes["gen_ai.usage.output_tokens"] == response["usage"]["output_tokens"]

    traced.run(main())


def test_who_looks_after_the_process_makes_no_spans(traced) -> None:
    for path in ("/health/live", "/health/ready", "/metrics", "/admin/status"):
        traced.run(traced.client.get(path))
    assert not traced.spans


def test_without_opentelemetry_the_remedy_is_named(monkeypatch) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *arguments: object, **options: object) -> object:
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(OptionError, match=r"not installed .*pip install 'fastserve-llm\[otel\]'"):
        Tracing.from_environment()


@pytest.mark.parametrize(
    ("variables", "missing"),
    [
        ({"OTEL_TRACES_EXPORTER": "console,zipkin"}, "'zipkin'"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "carrier-pigeon"}, "'carrier-pigeon'"),
    ],
)
def test_an_exporter_that_there_is_not_is_refused_by_name(monkeypatch, variables, missing: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match=f"no exporter {missing} is installed"):
        Tracing.from_environment()


class Collector(BaseHTTPRequestHandler):
    """Takes what is sent by OTLP over HTTP."""

    bodies: list[bytes]

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_process_sends_its_spans_where_the_variables_say(stories_for_chat, tmp_path) -> None:
    handler = type("_Collector", (Collector,), {"bodies": []})
    collector = HTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=collector.serve_forever)
    thread.start()
    try:
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
        }
        options = ("--otel", "--threads", "1", "--context-length", "64", "--kv-memory", "1MiB")
        with serving(stories_for_chat, tmp_path / "log", *options, environment=environment) as server:
            httpx.post(f"{server.url}/v1/completions", json=BODY).raise_for_status()
            assert server.terminate() == 0
    finally:
        collector.shutdown()
        thread.join()
        collector.server_close()
    sent = b"".join(handler.bodies)
    for part in (b"POST /v1/completions", b"first token", b"service.name", b"fastserve"):
        assert part in sent


def test_a_collector_that_is_not_there_costs_no_request_and_no_line_that_is_no_json(
    stories_for_chat, tmp_path
) -> None:
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    options = ("--otel", "--threads", "1", "--context-length", "64", "--kv-memory", "1MiB")
    with serving(stories_for_chat, tmp_path / "log", *options, environment=environment) as server:
        httpx.post(f"{server.url}/v1/completions", json=BODY).raise_for_status()
        deadline = time.monotonic() + 30
        while not [line for line in server.log if line["logger"].startswith("opentelemetry")]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        requests = [line for line in server.log if line["event"] == "request"]
        assert [line["status"] for line in requests] == [200]
        assert len(requests[0]["trace_id"]) == 32
        started = time.monotonic()
        assert server.terminate() == 0
        assert time.monotonic() - started < 20
