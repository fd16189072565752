"""What Prometheus reads of requests: counters and histograms, in a registry of the server's own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from fastserve.engine.completion import Completion

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """Of one server's requests."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.http_requests = Counter(
            "fastserve_http_requests",
            "Requests that have ended, by status; 499 is a client that went before its answer.",
            ["method", "route", "status"],
            registry=registry,
        )
        self.http_in_flight = Gauge(
            "fastserve_http_requests_in_flight", "Requests without their whole answer.", registry=registry
        )
        self.prompt_tokens = Counter(
            "fastserve_prompt_tokens",
            "Tokens of prompts, and of texts to embed.",
            ["model"],
            registry=registry,
        )
        self.completion_tokens = Counter(
            "fastserve_completion_tokens",
            "Tokens of completions, also of those that were given up.",
            ["model"],
            registry=registry,
        )
        self.completions = Counter(
            "fastserve_completions", "By why they ended.", ["model", "finish_reason"], registry=registry
        )
        self.queue_seconds = _histogram(
            registry, "queue_seconds", "From a request's arrival to its first turn.", _SECONDS
        )
        self.time_to_first_token_seconds = _histogram(
            registry, "time_to_first_token_seconds", "From a request's arrival to its first token.", _SECONDS
        )
        self.time_per_output_token_seconds = _histogram(
            registry,
            "time_per_output_token_seconds",
            "Mean of a completion, after its first token.",
            _TOKEN_SECONDS,
        )
        self.total_seconds = _histogram(
            registry, "total_seconds", "From a request's arrival to a completion's end.", _SECONDS
        )

    def observe(self, model: str, completion: Completion) -> None:
        """A completion has ended."""
        self.completions.labels(model, completion.finish_reason).inc()
        self.completion_tokens.labels(model).inc(completion.completion_tokens)
        self.queue_seconds.labels(model).observe(completion.queue_seconds)
        self.total_seconds.labels(model).observe(completion.total_seconds)
        if completion.completion_tokens:
            seconds = completion.time_to_first_token_seconds
            self.time_to_first_token_seconds.labels(model).observe(seconds)
        if completion.decode_tokens_per_second:
            seconds = 1 / completion.decode_tokens_per_second
            self.time_per_output_token_seconds.labels(model).observe(seconds)


def _histogram(registry: CollectorRegistry, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(f"fastserve_{name}", text, ["model"], registry=registry, buckets=buckets)
