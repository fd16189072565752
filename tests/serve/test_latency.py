"""Histograms of requests, as the dashboard reads them."""

from __future__ import annotations

from bisect import bisect_left

from fastserve.serve.latency import read_latencies
from fastserve.serve.metrics import Metrics


def test_a_value_is_counted_in_its_bucket_once() -> None:
    metrics = Metrics()
    values = [0.001, 0.005, 0.0051, 3.0, 1000.0]
    for value in values:
        metrics.time_to_first_token_seconds.labels("a").observe(value)
    metrics.time_per_output_token_seconds.labels("a").observe(0.004)
    metrics.time_to_first_token_seconds.labels("only a single token").observe(1.0)
    (latency,) = read_latencies(metrics)
    first = latency.time_to_first_token_seconds
    assert latency.model == "a"
    assert len(first.counts) == len(first.bounds) + 1
    expected = [0] * len(first.counts)
    for value in values:
        expected[bisect_left(first.bounds, value)] += 1
    assert first.counts == expected
    assert sum(latency.time_per_output_token_seconds.counts) == 1


def test_a_server_that_has_answered_nothing_has_none() -> None:
    assert read_latencies(Metrics()) == []
