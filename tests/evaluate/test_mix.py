from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastserve.errors import TraceError
from fastserve.evaluate.mix import make_traffic
from fastserve.evaluate.traffic import scale_to_rate

REQUESTS = 20_000


def columns(name: str, data: Path | None = None, **options: float) -> dict[str, np.ndarray]:
    arrivals = make_traffic(name, data=data, **options).arrivals(REQUESTS, 1)
    return {
        "times": np.array([a.arrival_seconds for a in arrivals]),
        "prompts": np.array([a.prompt_tokens for a in arrivals]),
        "completions": np.array([a.completion_tokens for a in arrivals]),
        "tenants": np.array([a.tenant for a in arrivals]),
    }


def cv_of_gaps(times: np.ndarray) -> float:
    gaps = np.diff(times)
    return float(gaps.std() / gaps.mean())


def test_short_chat_is_as_defined() -> None:
    mix = columns("short-chat")
    assert (mix["prompts"].min(), mix["prompts"].max()) == (16, 400)
    assert mix["prompts"].mean() == pytest.approx(208, rel=0.02)
    assert np.median(mix["completions"]) == pytest.approx(120, rel=0.04)
    assert np.log(mix["completions"]).std() == pytest.approx(1.3, rel=0.04)
    assert cv_of_gaps(mix["times"]) == pytest.approx(1.0, rel=0.04)


def test_sharegpt_has_its_lengths_and_bursts(shared_data: Path) -> None:
    mix = columns("sharegpt", shared_data)
    assert mix["prompts"].mean() == pytest.approx(2340, rel=0.03)
    assert mix["completions"].mean() == pytest.approx(439, rel=0.03)
    assert cv_of_gaps(mix["times"]) == pytest.approx(2.0, rel=0.05)


def test_the_mixed_kinds_have_their_shares_and_lengths(shared_data: Path) -> None:
    mix = columns("mixed", shared_data)
    expected = {"chat": 0.5, "code": 0.25, "conversation": 0.15, "summary": 0.05, "reasoning": 0.05}
    assert {str(t): float((mix["tenants"] == t).mean()) for t in expected} == pytest.approx(
        expected, abs=0.01
    )
    chat = mix["tenants"] == "chat"
    assert mix["prompts"][chat].mean() == pytest.approx(1155, rel=0.03)
    assert mix["completions"][chat].mean() == pytest.approx(211, rel=0.03)
    reasoning = mix["tenants"] == "reasoning"
    assert np.median(mix["completions"][reasoning]) == pytest.approx(1500, rel=0.1)
    assert (mix["prompts"][reasoning].min(), mix["prompts"][reasoning].max()) == (50, 800)


def test_a_seed_makes_the_same_requests_and_another_makes_others() -> None:
    mix = make_traffic("short-chat", data=None)
    assert mix.arrivals(100, 3) == mix.arrivals(100, 3)
    assert mix.arrivals(100, 3) != mix.arrivals(100, 4)


def test_the_bursts_of_a_mix_can_be_chosen() -> None:
    assert cv_of_gaps(columns("short-chat", cv=3.0)["times"]) == pytest.approx(3.0, rel=0.1)


def test_a_mix_that_takes_lengths_from_a_trace_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="FASTSERVE_TEST_DATA"):
        make_traffic("mixed", data=None)
    with pytest.raises(TraceError, match="has no traces/sarathi"):
        make_traffic("sharegpt", data=tmp_path)


def test_an_unknown_name_suggests_the_mixes() -> None:
    with pytest.raises(TraceError, match="mixes are short-chat, sharegpt, mixed"):
        make_traffic("long-chat", data=None)


def test_a_replayed_trace_keeps_its_bursts_at_any_rate(shared_data: Path) -> None:
    traffic = make_traffic("azure2023/AzureLLMInferenceTrace_code.csv", data=shared_data)
    arrivals = scale_to_rate(traffic.arrivals(8819, 0), 10.0)
    times = np.array([a.arrival_seconds for a in arrivals])
    assert len(times) / times[-1] == pytest.approx(10.0, rel=0.001)
    assert cv_of_gaps(times) == pytest.approx(13, rel=0.05)


def test_a_seed_starts_elsewhere_in_a_trace_and_wraps_round(shared_data: Path) -> None:
    traffic = make_traffic("mooncake_fast25/synthetic_trace.jsonl", data=shared_data)
    whole, other = traffic.arrivals(3993, 0), traffic.arrivals(3993, 1)
    assert [a.prompt_tokens for a in whole] != [a.prompt_tokens for a in other]
    assert sorted(a.prompt_tokens for a in whole) == sorted(a.prompt_tokens for a in other)
    times = [a.arrival_seconds for a in other]
    assert times == sorted(times)
    assert times[0] == 0


def test_clients_send_at_their_rates(tmp_path: Path) -> None:
    (tmp_path / "chunk-1-trace.csv").write_text("0,4,1,Gamma,1,1\n600,0,0,,0,0\n")
    (tmp_path / "chunk-2-trace.csv").write_text("0,1,5,Weibull,0.8,1\n600,2,1,Gamma,1,1\n")
    # 3000 in the first window, 1200 in the second, then the first again
    arrivals = make_traffic(str(tmp_path), data=None).arrivals(4500, 1)
    times = np.array([a.arrival_seconds for a in arrivals])
    one = np.array([a.tenant == "chunk-1" for a in arrivals])
    assert one[times < 590].sum() == pytest.approx(4 * 600, rel=0.1)
    assert not one[(times > 610) & (times < 1190)].any()
    assert ((times > 610) & (times < 1190)).sum() == pytest.approx(2 * 580, rel=0.15)
