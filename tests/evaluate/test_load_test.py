from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("aiohttp")

from fake_server import TEMPLATE_TOKENS, TOKENS_PER_WORD, Behaviour, FakeServer, count_tokens, run_fake_server
from fastserve.errors import MeasurementError, OptionError, TraceError
from fastserve.evaluate.endpoint import Abilities, Endpoint, EndpointOptions
from fastserve.evaluate.exchange import Exchange
from fastserve.evaluate.load_figures import count_failures
from fastserve.evaluate.load_test import LoadOptions, LoadRow, LoadTest
from fastserve.evaluate.slo import Slo

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:17:0{second}.0000000,{40 + second},5\n" for second in range(6)
)


def options(**changes: Any) -> LoadOptions:
    fields: dict[str, Any] = {
        "traffic": "short-chat",
        "num_requests": 40,
        "length_scale": 0.1,
        "max_completion_tokens": 12,
        "warm_up": 2,
    }
    return LoadOptions(**{**fields, **changes})


def run_test(
    server: FakeServer, load: LoadOptions, *, rate: float | None = 200.0, api: Any = "completions"
) -> tuple[LoadTest, LoadRow]:
    async def run() -> tuple[LoadTest, LoadRow]:
        async with LoadTest(EndpointOptions(url=server.url, model="m", api=api), load) as test:
            return test, await test.run_at(rate)

    return asyncio.run(run())


def test_a_request_goes_on_another_connection_where_a_kept_one_is_closed_under_it() -> None:
    with run_fake_server(Behaviour(num_kept=1)) as server:
        _, row = run_test(server, options())
    assert row.figures["num_failed"] == 0
    assert row.figures["num_finished"] == 40


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_requests_have_the_lengths_of_the_traffic(api: str) -> None:
    with run_fake_server() as server:
        test, row = run_test(server, options(), api=api)
    figures = row.figures
    assert figures["num_finished"] == 40
    assert figures["num_failed"] == figures["short_completions"] == 0
    assert figures["completion_tokens_mean"] == figures["planned_completion_tokens_mean"]
    assert test.token_rate.per_word == TOKENS_PER_WORD
    assert test.token_rate.overhead == (TEMPLATE_TOKENS if api == "chat" else 0)
    sent = [exchange.planned.arrival.prompt_tokens for exchange in row.run.exchanges]
    counted = [exchange.prompt_tokens for exchange in row.run.exchanges]
    assert np.abs(np.array(sent) - counted).max() <= max(TOKENS_PER_WORD, TEMPLATE_TOKENS)
    body = server.bodies[-1]
    assert body["ignore_eos"] is True
    assert body["temperature"] == 0
    assert body["stream_options"] == {"include_usage": True}


def test_latencies_are_those_of_the_server() -> None:
    pace, delay = 0.01, 0.5  # seconds that a busy machine may take to hand a piece of text over
    with run_fake_server(Behaviour(token_seconds=pace)) as server:
        _, row = run_test(server, options(max_completion_tokens=20), rate=40.0)
    for exchange in row.run.exchanges:
        written = server.token_times[exchange.planned.prompt]
        assert exchange.completion_tokens == len(exchange.text_seconds) == len(written)
        late = np.array(exchange.text_seconds) - written
        assert late.min() >= 0
        assert late.max() < delay
        assert exchange.end_seconds == exchange.text_seconds[-1]
    counted = row.run.exchanges[2:]  # of 40
    ttft = [e.text_seconds[0] - e.arrival_seconds for e in counted]
    gaps = np.concatenate([np.diff(e.text_seconds) for e in counted])
    normalized = [(e.text_seconds[-1] - e.arrival_seconds) / len(e.text_seconds) for e in counted]
    figures = row.figures
    assert figures["ttft_mean_seconds"] == pytest.approx(np.mean(ttft))
    assert figures["ttft_max_seconds"] == pytest.approx(max(ttft))
    assert figures["itl_p99_seconds"] == pytest.approx(np.percentile(gaps, 99))
    assert figures["normalized_mean_seconds"] == pytest.approx(np.mean(normalized))
    assert figures["tpot_mean_seconds"] >= pace * 0.9


def test_an_open_loop_counts_from_when_a_request_was_to_be_sent() -> None:
    with run_fake_server(Behaviour(slots=1, token_seconds=0.01)) as server:
        _, row = run_test(server, options(max_completion_tokens=5, num_requests=20), rate=1000.0)
    assert server.most_at_once > 10  # none waited for the one before to end
    assert row.figures["ttft_max_seconds"] > 19 * 0.02  # behind all others


def test_a_closed_loop_keeps_so_many_requests_under_way() -> None:
    async def run(server: FakeServer) -> LoadRow:
        async with LoadTest(EndpointOptions(url=server.url, model="m"), options(warm_up=0)) as test:
            return await test.run_with(5)

    with run_fake_server() as server:
        row = asyncio.run(run(server))
    assert server.most_at_once == 5
    assert row.figures["num_finished"] == 40


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        (Behaviour(ending="close"), "connection lost"),
        (Behaviour(ending="stall"), "stalled"),
        (Behaviour(ending="error"), "error in stream engine_error"),
        (Behaviour(ending="garbage"), "malformed"),
        (Behaviour(ending="nested"), "malformed"),
        (Behaviour(ending="silent end"), "cut short"),
        (Behaviour(status=429), "http 429 queue_full"),
        (Behaviour(status=500), "http 500 queue_full"),
    ],
)
def test_failures_are_counted_by_kind(behaviour: Behaviour, kind: str) -> None:
    behaviour.num_good = 12  # two probes and ten requests
    with run_fake_server(behaviour) as server:
        stall_seconds = 1.5 if kind == "stalled" else 60.0
        _, row = run_test(server, options(warm_up=0, stall_seconds=stall_seconds, num_requests=30))
    assert count_failures(row.run.exchanges) == {kind: 20}
    assert row.figures["num_finished"] == 10
    assert row.figures["num_failed"] == 20
    assert row.figures["good_share"] <= 10 / 28


def test_a_server_that_dies_leaves_a_report() -> None:
    async def run() -> LoadRow:
        with ExitStack() as stack:
            server = stack.enter_context(run_fake_server(Behaviour(token_seconds=0.02)))
            async with LoadTest(EndpointOptions(url=server.url, model="m"), options()) as test:
                task = asyncio.create_task(test.run_at(40.0))
                await asyncio.sleep(0.5)
                await asyncio.to_thread(stack.close)
                return await task

    row = asyncio.run(run())
    assert row.figures["num_requests"] == 40
    assert row.figures["num_finished"] > 0
    assert set(count_failures(row.run.exchanges)) == {"connection lost", "connection refused"}


@pytest.mark.parametrize("is_open", [True, False])
def test_a_defect_of_the_client_is_no_failure_of_the_server(
    is_open: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Endpoint.send
    num_sent = 0

    async def send_all_but_one(
        self: Endpoint, exchange: Exchange, *, max_tokens: int, abilities: Abilities
    ) -> None:
        nonlocal num_sent
        num_sent += 1
        if num_sent == 10:
            raise RuntimeError("a defect")
        await send(self, exchange, max_tokens=max_tokens, abilities=abilities)

    async def run(server: FakeServer) -> None:
        async with LoadTest(EndpointOptions(url=server.url, model="m"), options(warm_up=0)) as test:
            await (test.run_at(200.0) if is_open else test.run_with(5))

    monkeypatch.setattr(Endpoint, "send", send_all_but_one)
    with run_fake_server() as server, pytest.raises(RuntimeError, match="a defect"):
        asyncio.run(run(server))


def test_no_server_is_an_error_that_says_so() -> None:
    with run_fake_server() as server:
        url = server.url

    async def run() -> None:
        async with LoadTest(EndpointOptions(url=url, model="m"), options()):
            pass

    with pytest.raises(MeasurementError, match="does not answer: connection refused"):
        asyncio.run(run())


@pytest.mark.parametrize("field", ["ignore_eos", "stream_options"])
def test_what_a_server_does_not_take_is_left_out(field: str) -> None:
    with run_fake_server(Behaviour(refuses=(field,))) as server:
        test, row = run_test(server, options())
    assert field not in server.bodies[-1]
    assert row.figures["num_finished"] == 40
    assert test.abilities.ignores_eos is (field != "ignore_eos")
    assert test.abilities.tells_usage is (field != "stream_options")


def test_without_usage_pieces_of_text_are_counted() -> None:
    with run_fake_server(Behaviour(tells_usage=False)) as server:
        test, row = run_test(server, options())
    assert not test.abilities.tells_usage
    assert row.figures["completion_tokens_mean"] == row.figures["planned_completion_tokens_mean"]


def test_prompts_are_the_same_for_a_seed_and_differ_from_run_to_run() -> None:
    async def run(server: FakeServer) -> None:
        async with LoadTest(EndpointOptions(url=server.url, model="m"), options(warm_up=0)) as test:
            await test.run_at(400.0)
            await test.run_at(400.0)

    sent = []
    for _ in range(2):
        with run_fake_server() as server:
            asyncio.run(run(server))
        prompts = [body["prompt"] for body in server.bodies[2:]]
        assert not set(prompts[:40]) & set(prompts[40:])
        lengths = [sorted(len(prompt.split()) for prompt in part) for part in (prompts[:40], prompts[40:])]
        assert lengths[0] == lengths[1]
        sent.append(set(prompts))
    assert sent[0] == sent[1]


def test_a_trace_keeps_its_times_stretched(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text(AZURE)
    load = options(traffic=str(tmp_path / "trace.csv"), time_scale=0.05, length_scale=1.0, num_requests=8)
    with run_fake_server() as server:
        _, row = run_test(server, load, rate=None)
        _, other = run_test(server, options(traffic=str(tmp_path / "trace.csv"), burstiness=0.25), rate=100.0)
    due = [e.arrival_seconds - row.run.exchanges[0].arrival_seconds for e in row.run.exchanges]
    assert due[:6] == pytest.approx([0.05 * second for second in range(6)])
    bursts = np.diff([e.arrival_seconds for e in other.run.exchanges])
    assert bursts.std() > 1.3 * bursts.mean()  # the trace's own gaps are all equal


def test_prompts_with_the_same_prefix_begin_alike(tmp_path: Path) -> None:
    rows = [
        f'{{"timestamp": {1000 * i}, "input_length": 600, "output_length": 2, "hash_ids": [7, {i}]}}'
        for i in range(4)
    ]
    (tmp_path / "trace.jsonl").write_text("\n".join(rows))
    load = options(traffic=str(tmp_path / "trace.jsonl"), length_scale=1.0, num_requests=4, warm_up=0)
    with run_fake_server() as server:
        run_test(server, load)
    prompts = [body["prompt"].split() for body in server.bodies[2:]]
    assert len({tuple(prompt[:256]) for prompt in prompts}) == 1  # 512 tokens
    assert len({tuple(prompt[256:]) for prompt in prompts}) == 4
    assert {count_tokens(body) for body in server.bodies[2:]} == {600}


@pytest.mark.parametrize(
    "lines",
    [
        '{"prompt": "one two"}\n{"prompt": "three four"}\n',
        '\ufeff{"question": "one two", "answer": "5"}\n\n{"turns": ["three four", "more"]}',
        '[{"conversations": [{"from": "human", "value": "one two"}]}, {"instruction": "three four"}]',
    ],
)
def test_prompts_of_a_data_set_are_sent_as_they_are(lines: str, tmp_path: Path) -> None:
    (tmp_path / "set.json").write_text(lines, encoding="utf-8")
    with run_fake_server() as server:
        _, row = run_test(server, options(prompts="set.json", data=tmp_path, warm_up=2))
    assert {body["prompt"] for body in server.bodies[2:]} == {"one two", "three four"}
    assert row.figures["planned_prompt_tokens_mean"] == row.figures["prompt_tokens_mean"]


@pytest.mark.parametrize("text", ["", "{", '{"answer": 1}', "[]", "[1]", '{"turns": []}', '{"prompt": {}}'])
def test_a_data_set_without_prompts_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "set.json").write_text(text)
    with pytest.raises(TraceError, match=r"set\.json"):
        LoadTest(
            EndpointOptions(url="http://127.0.0.1:1", model="m"), options(prompts=str(tmp_path / "set.json"))
        )


@pytest.mark.slow  # a busy machine holds the objective at hardly any rate, and low rates take long
def test_the_highest_rate_is_that_of_the_server() -> None:
    """Four slots of 0.05 seconds: 80 requests a second."""
    load = options(
        max_completion_tokens=5, length_scale=1.0, num_requests=100, slo=Slo.parse("e2e_p95=0.2"), warm_up=0
    )

    async def run(server: FakeServer) -> tuple[tuple[float, float], LoadTest]:
        async with LoadTest(EndpointOptions(url=server.url, model="m"), load) as test:
            return await test.find_rate(start=40.0, precision=0.3), test

    with run_fake_server(Behaviour(slots=4, token_seconds=0.01)) as server:
        (held, missed), test = asyncio.run(run(server))
    assert held < missed <= held * 1.3
    assert held < 95
    for row in test.rows:
        assert row.rate is not None
        assert row.is_held is (row.rate <= held)


def test_a_run_that_is_lost_ends_before_its_time() -> None:
    load = options(num_requests=100, slo=Slo.parse("ttft_p99=0.1"), warm_up=0)

    async def run(server: FakeServer) -> LoadRow:
        async with LoadTest(EndpointOptions(url=server.url, model="m"), load) as test:
            return await test.run_at(20.0, stops_when_lost=True)

    with run_fake_server(Behaviour(token_seconds=0.2)) as server:
        row = asyncio.run(run(server))
    assert row.run.was_stopped
    assert row.is_held is False
    assert row.figures["num_requests"] < 60
    assert set(count_failures(row.run.exchanges)) == {"given up"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"burstiness": 0.0}, "burstiness=0.0 is out of range"),
        ({"length_scale": -1.0}, "length_scale=-1.0 is out of range"),
        ({"num_requests": 1}, "requests=1 is out of range"),
        ({"time_scale": 1.0, "burstiness": 1.0}, "leave one of the two out"),
    ],
)
def test_an_option_out_of_range_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        options(**changes)


def test_a_mix_has_no_times_to_stretch() -> None:
    with pytest.raises(OptionError, match="needs a trace with times"):
        LoadTest(EndpointOptions(url="http://127.0.0.1:1", model="m"), options(time_scale=1.0))


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://", "http://a:b"])
def test_a_url_of_no_server_is_refused(url: str) -> None:
    with pytest.raises(OptionError, match="is no address of a server"):
        EndpointOptions(url=url, model="m")


@pytest.mark.parametrize("text", ["ttft=5", "ttft_p98=5", "ttft_p99", "speed_mean=1", "e2e_mean=-1"])
def test_an_slo_of_no_figure_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="slo"):
        Slo.parse(text)
