from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastserve.errors import TraceError
from fastserve.evaluate.trace import LengthTrace, RateTrace, TimedTrace, find_trace, read_trace

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:17:04.0319600,3180,8\n"
    "2023-11-16 18:17:03.9799600,4808,10\n"
)
MOONCAKE = {"timestamp": 500, "input_length": 600, "output_length": 3, "hash_ids": [0, 7]}


def write(tmp_path: Path, text: str, name: str = "trace.csv") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_azure_requests_are_ordered_and_begin_at_zero(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, AZURE))
    assert isinstance(trace, TimedTrace)
    first, second = trace.arrivals
    assert (first.prompt_tokens, first.completion_tokens, first.arrival_seconds) == (4808, 10, 0.0)
    assert second.arrival_seconds == pytest.approx(0.052, abs=1e-6)


def test_mooncake_times_are_milliseconds_and_prefixes_are_kept(tmp_path: Path) -> None:
    lines = [json.dumps({**MOONCAKE, "timestamp": time}) for time in (0, 500)]
    trace = read_trace(write(tmp_path, "\n".join(lines), "trace.jsonl"))
    assert isinstance(trace, TimedTrace)
    assert [arrival.arrival_seconds for arrival in trace.arrivals] == [0.0, 0.5]
    assert trace.arrivals[0].prefix_ids == (0, 7)


def test_equal_prefix_ids_are_equal_tokens_and_the_rest_is_a_prompts_own(tmp_path: Path) -> None:
    lines = [json.dumps({**MOONCAKE, "timestamp": t, "hash_ids": [0, i]}) for t, i in ((0, 5), (1, 6))]
    trace = read_trace(write(tmp_path, "\n".join(lines)))
    assert isinstance(trace, TimedTrace)
    one, other = (arrival.prompt_ids(index) for index, arrival in enumerate(trace.arrivals))
    assert len(one) == len(other) == 600
    assert one[:512] == other[:512]
    assert set(one[512:]).isdisjoint(other)


def test_lengths_alone_are_told_by_their_columns(tmp_path: Path) -> None:
    text = "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n74,918,992,0.08\n"
    assert read_trace(write(tmp_path, text)) == LengthTrace(((74, 918),))


def test_a_folder_of_clients_is_one_trace(tmp_path: Path) -> None:
    write(tmp_path, "0,0.5,1.4,Gamma,0.51,59.6\n600,0,0,,0,0\n", "chunk-7-trace.csv")
    write(tmp_path, "0,2,1.4,Weibull,0.8,1\n", "chunk-12-trace.csv")
    trace = read_trace(tmp_path)
    assert isinstance(trace, RateTrace)
    assert [(name, [window.rate for window in windows]) for name, windows in trace.clients] == [
        ("chunk-12", [2.0]),
        ("chunk-7", [0.5, 0.0]),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (AZURE + "2023-11-16 18:17:05.1,none,8\n", "line 4 .* ContextTokens is 'none'"),
        (AZURE + "yesterday,1,8\n", "line 4 .* TIMESTAMP is 'yesterday'"),
        (AZURE + "2023-11-16 18:17:05.1,0,8\n", "line 4 .* ContextTokens is '0'"),
        (AZURE + "2023-11-16 18:17:05.1,3\n", "line 4 .* has 2 fields of 3"),
        (AZURE[:39], "holds no requests"),
        ("num_prefill_tokens,num_decode_tokens\n3,-1\n", "line 2 .* num_decode_tokens is '-1'"),
        ('{"timestamp": 0}\n', "line 1 .* input_length is missing"),
        ("{\n", "line 1 .* is no JSON"),
        (json.dumps({**MOONCAKE, "hash_ids": [1, 2, 3]}), "hash_ids are 3, too many for 600 tokens"),
        (json.dumps({**MOONCAKE, "hash_ids": [-1]}), "hash_ids are not a list of whole numbers"),
        (json.dumps({**MOONCAKE, "timestamp": -5}), "timestamp is -5"),
        (json.dumps({**MOONCAKE, "output_length": 2.5}), "output_length is 2.5"),
        (json.dumps(MOONCAKE), "come at one moment"),
        ("0,0.5,1.4,Pareto,0.51,59.6\n", "line 1 .* family is 'Pareto'"),
        ("0,nan,1.4,Gamma,0.51,59.6\n", "line 1 .* rate is 'nan'"),
        ("0,0,0,,0,0\n", "no client that sends requests"),
        ("a,b,c\n1,2,3\n", "no known format"),
        ("", "no known format"),
    ],
)
def test_a_broken_trace_is_named_by_line_and_field(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(TraceError, match=said):
        read_trace(write(tmp_path, text))


def test_bytes_are_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(path)


def test_a_trace_is_looked_for_below_the_folder_of_data(tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    path = write(tmp_path / "traces", AZURE, "code.csv")
    assert find_trace("code.csv", tmp_path) == path
    assert find_trace(str(path), None) == path
    with pytest.raises(TraceError, match=r"no trace is at nope\.csv or below"):
        find_trace("nope.csv", tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "size"),
    [
        ("azure2023/AzureLLMInferenceTrace_code.csv", TimedTrace, 8819),
        ("mooncake_fast25/synthetic_trace.jsonl", TimedTrace, 3993),
        ("sarathi/sharegpt_8k_filtered_stats_llama2_tokenizer.csv", LengthTrace, 30731),
        ("vidur_processed/arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv", LengthTrace, 28257),
        ("servegen/m-small", RateTrace, 11),
    ],
)
def test_published_traces_are_read_whole(shared_data: Path, name: str, kind: type, size: int) -> None:
    trace = read_trace(find_trace(name, shared_data))
    assert isinstance(trace, kind)
    match trace:
        case TimedTrace():
            assert len(trace.arrivals) == size
        case LengthTrace():
            assert len(trace.lengths) == size
        case RateTrace():
            assert len(trace.clients) == size
