from __future__ import annotations

import json

import pytest

pytest.importorskip("fastserve._native")

from evaluate_machine import make_limits

from fastserve.errors import OptionError
from fastserve.evaluate.model_speed import EngineSpeed, ModelSpeed, SpeedOptions, Start, choose_measures
from fastserve.evaluate.random_model import SHAPES
from fastserve.models.family import read_config

LLAMA = read_config(SHAPES["smollm2-135m"])
BERT = read_config(SHAPES["minilm"])


def make_speed(*rates: float, start: float = 1.0) -> EngineSpeed:
    return EngineSpeed(
        version="1",
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
    other = document["peers"]["other"]
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
