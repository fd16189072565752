"""Spans of requests, by OpenTelemetry, which is an extra: imported when it is asked for.

A span is as long as its request, with the end of a response in the background; it goes on from the client's
`traceparent`. Where spans go is said by the standard's variables (OTEL_TRACES_EXPORTER,
OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, ...:
https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from time import time_ns
from typing import TYPE_CHECKING, Self

from starlette.types import Scope

from fastserve._version import __version__
from fastserve.errors import OptionError
from fastserve.serve.record import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

_UNTRACED = ("/health/", "/metrics", "/admin/")  # asked for again and again by who looks after the process
_PROTOCOLS = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}

# Attributes by what the record of a request calls them. Those of gen_ai are the standard's:
# https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
_ATTRIBUTES: Mapping[str, str] = {
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "tenant": "fastserve.tenant",
}


class Tracing:
    """Makes spans.

    Args:
        provider: this object's own from here on.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("fastserve", __version__)

    @classmethod
    def from_environment(cls) -> Self:
        """As the standard's variables say; without any, spans go by OTLP over HTTP to localhost:4318.

        Raises:
            OptionError: OpenTelemetry, or an exporter that a variable names, is not installed.
        """
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise OptionError(
                "otel needs OpenTelemetry, which is not installed",
                hint="pip install 'fastserve-llm[otel]', or leave --otel out",
                option="otel",
            ) from error
        resource = Resource.create()
        if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "fastserve", "service.version": __version__}))
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        for exporter in _exporters():
            provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    def begin(self, scope: Scope, record: RequestRecord) -> RequestSpan | None:
        """The span of a request that has just come; None: it is not for this one."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if scope["path"].startswith(_UNTRACED):
            return None
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        start_ns = time_ns()
        span = self._tracer.start_span(
            scope["method"],
            TraceContextTextMapPropagator().extract(headers),
            SpanKind.SERVER,
            {
                "http.request.method": scope["method"],
                "url.path": scope["path"],
                "url.scheme": scope["scheme"],
                "fastserve.request_id": record.request_id,
            },
            start_time=start_ns,
        )
        return RequestSpan(span, start_ns, record.arrival_seconds)

    def close(self) -> None:
        """Send what has not been sent; it may take seconds."""
        self._provider.shutdown()


class RequestSpan:
    """Of one request. The log has its `trace_id`.

    Args:
        start_ns: Unix, nanoseconds, when it was `start_seconds` by `time.perf_counter`.
    """

    def __init__(self, span: Span, start_ns: int, start_seconds: float) -> None:
        self._span = span
        self._start_ns = start_ns
        self._start_seconds = start_seconds
        self.trace_id = f"{span.get_span_context().trace_id:032x}"

    def end(self, scope: Scope, record: RequestRecord, *, status: int) -> None:
        """The request has ended, with this status."""
        from opentelemetry.trace import StatusCode

        span = self._span
        if route := getattr(scope.get("route"), "path", None):
            span.update_name(f"{scope['method']} {route}")
            span.set_attribute("http.route", route)
        span.set_attribute("http.response.status_code", status)
        for name, attribute in _ATTRIBUTES.items():
            if name in record.details:
                span.set_attribute(attribute, record.details[name])
        if record.finish_reasons:
            span.set_attribute("gen_ai.response.finish_reasons", record.finish_reasons)
        self._add_event("first turn", "fastserve.queue_seconds", record.first_turn_seconds)
        self._add_event("first token", "fastserve.time_to_first_token_seconds", record.first_token_seconds)
        if status >= 500 or "error" in record.finish_reasons:
            span.set_status(StatusCode.ERROR)
            span.set_attribute("error.type", str(status) if status >= 500 else "completion_failed")
        span.end()

    def _add_event(self, name: str, attribute: str, seconds: float | None) -> None:
        """What happened at a time, by `time.perf_counter`, with how long after the request's arrival."""
        if seconds is not None:
            passed = max(seconds - self._start_seconds, 0.0)
            self._span.add_event(name, {attribute: passed}, self._start_ns + int(passed * 1e9))


def _exporters() -> Iterator[SpanExporter]:
    """Those that OTEL_TRACES_EXPORTER names."""
    names = os.environ.get("OTEL_TRACES_EXPORTER", "").strip() or "otlp"
    for name in map(str.strip, names.split(",")):
        if name == "none":
            continue
        entry = _PROTOCOLS.get(_protocol(), _protocol()) if name == "otlp" else name
        found = list(entry_points(group="opentelemetry_traces_exporter", name=entry))
        if not found:
            raise OptionError(
                f"otel: no exporter {entry!r} is installed, which OTEL_TRACES_EXPORTER={names!r} asks for",
                hint="set it to otlp, console or none, or install the exporter's package",
                option="otel",
            )
        yield found[0].load()()


def _protocol() -> str:
    for variable in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if protocol := os.environ.get(variable, "").strip():
            return protocol
    return "http/protobuf"
