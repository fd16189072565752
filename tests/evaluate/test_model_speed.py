from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastserve._native")

from evaluate_machine import make_limits

from fastserve.errors import OptionError
from fastserve.evaluate.model_speed import (
    EngineSpeed,
    ModelSpeed,
    SpeedOptions,
    Start,
    choose_measures,
    choose_peers,
    measure_model,
)
from fastserve.evaluate.random_model import SHAPES, write_random_model
from fastserve.evaluate.workload import ENCODER_MEASURES, Sentences
from fastserve.models.family import read_config

LLAMA = read_config(SHAPES["smollm2-135m"])
BERT = read_config(SHAPES["minilm"])


def make_speed(*rates: float, start: float = 1.0) -> EngineSpeed:
    return EngineSpeed(
        version="1",
        weights="int8",
        rates={"decode_1_tokens_per_second": rates},
        start=Start(first_token_seconds=start, peak_memory_bytes=100),
    )


def test_ratios_are_taken_within_pairs() -> None:
    speed = ModelSpeed(
        model="m",
        options=SpeedOptions(weights="int8"),
        limits=make_limits(),
        ours=make_speed(20.0, 10.0, 30.0),
        peers={"other": make_speed(10.0, 10.0, 10.0, start=3.0)},
        left_out={"another": "is not compared"},
        shares={"decode_1_share_of_bandwidth": 0.5},
        profile=(),
    )
    assert speed.ratios("other")["decode_1_tokens_per_second"].median == 2.0
    document = json.loads(json.dumps(speed.to_json()))
    assert document["decode_1_tokens_per_second"] == 20.0
    assert document["decode_1_share_of_bandwidth"] == 0.5
    assert document["start_to_first_token_seconds"] == 1.0
    assert document["peak_memory_bytes"] == 100
    assert document["runs"] == {"decode_1_tokens_per_second": [20.0, 10.0, 30.0]}
    assert document["left_out"] == {"another": "is not compared"}
    other = document["peers"]["other"]
    assert other["weights"] == "int8"
    assert other["start_to_first_token_seconds"] == 3.0
    assert other["ratios"]["decode_1_tokens_per_second"]["low"] == 1.0


def test_measures_are_chosen_by_the_beginnings_of_their_names() -> None:
    assert list(choose_measures(LLAMA, ["decode_8", "prefill_5"])) == [
        "prefill_512_tokens_per_second",
        "decode_8_tokens_per_second",
    ]


def test_an_encoder_has_measures_of_its_own() -> None:
    assert list(choose_measures(BERT, [])) == [
        "equal_32_sentences_per_second",
        "ragged_32_sentences_per_second",
    ]


def test_what_a_context_does_not_hold_is_not_measured() -> None:
    short = read_config({**SHAPES["smollm2-135m"], "max_position_embeddings": 512})
    assert "prefill_512_tokens_per_second" not in choose_measures(short, [])
    assert "prefill_128_tokens_per_second" in choose_measures(short, [])


def test_an_unknown_measure_is_refused_with_the_known_ones() -> None:
    with pytest.raises(OptionError) as caught:
        choose_measures(LLAMA, ["latency"])
    assert "latency" in caught.value.message
    assert "decode_1_tokens_per_second" in str(caught.value.hint)


def test_sentences_are_also_counted_in_tokens_without_padding() -> None:
    (lengths,) = (
        measure.lengths
        for name, measure in ENCODER_MEASURES.items()
        if name.startswith("ragged") and isinstance(measure, Sentences)
    )
    speed = EngineSpeed(
        version="1",
        weights="int8",
        rates={"ragged_32_sentences_per_second": [64.0]},
        start=Start(first_token_seconds=1, peak_memory_bytes=1),
    )
    assert speed.to_json()["ragged_32_tokens_per_second"] == 2 * sum(lengths)


def test_peers_run_models_of_their_task_alone() -> None:
    peers = {name: Path("python") for name in ("vllm", "onnxruntime")}
    able, left_out = choose_peers(peers, "embed")
    assert list(able) == ["onnxruntime"]
    assert list(left_out) == ["vllm"]
    assert choose_peers(peers, "generate")[0].keys() == {"vllm"}


def test_peers_that_all_do_something_else_are_refused_with_those_that_do_it() -> None:
    with pytest.raises(OptionError) as caught:
        choose_peers({"onnxruntime": Path("python")}, "generate")
    assert "onnxruntime" in caught.value.message
    assert "llama.cpp" in str(caught.value.hint)


def test_a_peer_that_does_not_start_is_left_out_with_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shape = {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 40, "num_hidden_layers": 1}
    write_random_model({**SHAPES["minilm"], **shape, "vocab_size": 300}, tmp_path / "m")
    options = SpeedOptions(
        weights="int8", threads=1, pairs=1, only=["equal"], peers={"onnxruntime": Path(sys.executable)}
    )
    speed = measure_model(tmp_path / "m", options, name="tiny")
    assert (speed.model, speed.peers) == ("tiny", {})
    assert "failed: onnxruntime ended" in speed.left_out["onnxruntime"]
    assert "onnxruntime is left out" in caplog.text
    assert speed.to_json()["equal_32_tokens_per_second"] > 0
