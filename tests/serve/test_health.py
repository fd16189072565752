"""Health and metrics."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from fastserve.serve.options import ServeOptions
from serve.conftest import STORIES


def samples(server) -> dict[tuple[str, ...], float]:
    """By name and the values of the labels, that of the model left out."""
    response = server.get("/metrics")
    assert response.status_code == 200
    return {
        (
            sample.name,
            *(value for name, value in sorted(sample.labels.items()) if name != "model"),
        ): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_metrics_count_requests_tokens_and_steps(make_server) -> None:
    server = make_server()
    body = {"model": STORIES, "prompt": "He", "max_tokens": 8, "ignore_eos": True, "n": 2}
    server.post("/v1/completions", body)
    server.post("/v1/completions", {**body, "stream": True})
    server.post("/v1/completions", {**body, "n": 0})
    got = samples(server)
    assert got["fastserve_http_requests_total", "POST", "/v1/completions", "200"] == 2
    assert got["fastserve_http_requests_total", "POST", "/v1/completions", "400"] == 1
    assert got[("fastserve_completion_tokens_total",)] == 32
    assert got["fastserve_completions_total", "length"] == 4
    for name in ("queue", "time_to_first_token", "time_per_output_token", "total"):
        assert got[(f"fastserve_{name}_seconds_count",)] == 4
    num_steps = got[("fastserve_step_sequences_count",)]
    assert 8 <= num_steps <= 32
    assert {got["fastserve_step_seconds_count", phase] for phase in ("schedule", "run", "emit")} == {
        num_steps
    }
    assert got[("fastserve_step_tokens_sum",)] >= 28
    assert got["fastserve_kv_blocks_used", "fast"] == 0
    assert got["fastserve_sequences", "fast"] == 0


def test_a_defect_of_ours_is_counted_and_answered_as_one(make_server, monkeypatch) -> None:
    server = make_server()

    def fail(*_: object) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(type(server.app.state.service.models), "find", fail)
    body = {"model": STORIES, "prompt": "He", "max_tokens": 8}
    response = server.post("/v1/completions", body, headers={"x-request-id": "mine"})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert response.headers["x-request-id"] == "mine"
    assert samples(server)["fastserve_http_requests_total", "POST", "/v1/completions", "500"] == 1


def test_ready_turns_red_when_no_step_ends(make_server, monkeypatch) -> None:
    server = make_server(ServeOptions(ready_seconds=5))
    assert server.get("/health/ready").status_code == 200
    monkeypatch.setattr(type(server.llm), "seconds_without_step", 6.0)
    response = server.get("/health/ready")
    assert response.status_code == 503
    assert STORIES in response.json()["reasons"]
    assert server.get("/health/live").status_code == 200


def test_live_turns_red_when_the_engine_has_died(make_server) -> None:
    server = make_server()
    server.run(server.llm.close())
    assert server.get("/health/live").status_code == 503
    assert server.get("/health/ready").status_code == 503
    assert server.get("/metrics").status_code == 200


def test_methods_that_clients_make_up_are_counted_as_one(make_server) -> None:
    server = make_server()
    for index in range(20):
        server.run(server.client.request(f"GRAB{index}", "/v1/models"))
    counts = [key for key in samples(server) if key[0] == "fastserve_http_requests_total"]
    assert [key[1] for key in counts] == ["other"]
