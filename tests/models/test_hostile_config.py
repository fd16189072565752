"""Configs of every family with one value that no config has: named errors, at once."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import transformers

from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.models.family import DECODER_FAMILIES, ENCODER_DECODER_FAMILIES, ENCODER_FAMILIES, read_config

BAD: tuple[Any, ...] = (
    -1, 0, 10**9, 10**30, float("inf"), -1e30, float("nan"), None, "x", [], {}, True, [1, 1, 1],
    [{}], {"a": []}, 1.5, "relu",
)  # fmt: skip


def config_of(model_type: str) -> dict[str, Any]:
    config = transformers.CONFIG_MAPPING[model_type]().to_dict()
    families = {**DECODER_FAMILIES, **ENCODER_DECODER_FAMILIES}
    if model_type in families:
        config["architectures"] = [families[model_type].architectures[0]]
    return {key: value for key, value in config.items() if key != "dtype"}


@pytest.mark.parametrize("model_type", [*DECODER_FAMILIES, *ENCODER_FAMILIES, *ENCODER_DECODER_FAMILIES])
def test_a_value_that_no_config_has_is_refused_or_harmless(model_type: str) -> None:
    good = config_of(model_type)
    places: list[tuple[str, ...]] = [(key,) for key in good]
    places += [(key, inner) for key, value in good.items() if isinstance(value, dict) for inner in value]
    for place in places:
        for value in BAD:
            config = copy.deepcopy(good)
            target = config
            for key in place[:-1]:
                target = target[key]
            target[place[-1]] = value
            start = time.process_time()
            message = ""
            try:
                read_config(config)
            except (CheckpointError, UnsupportedError) as error:
                message = error.message
            except Exception as error:
                raise AssertionError(f"{'.'.join(place)}={str(value)[:30]!r}") from error
            assert len(message) < 1000, place
            assert time.process_time() - start < 1, (place, value)


def test_a_model_of_a_million_layers_is_refused_before_its_graph_is_made() -> None:
    with pytest.raises(CheckpointError, match="num_hidden_layers=1000000, the limit is 512"):
        read_config({**config_of("llama"), "num_hidden_layers": 1_000_000})
    with pytest.raises(CheckpointError, match="a number of more than 30 digits, the limit is 16777216"):
        read_config({**config_of("llama"), "vocab_size": 10**400})
