from __future__ import annotations

import pytest

from fastserve.errors import OptionError
from fastserve.types import SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 2**31),
        ("top_k", -1),
        ("top_k", 99999999999),
        ("top_k", 1.5),
        ("seed", 2**64),
        ("logprobs", 21),
        ("logit_bias", {2**31: 1.0}),
        ("logit_bias", {1: 101.0}),
        ("stop_token_ids", [2**31]),
        ("temperature", float("nan")),
        ("top_p", 0.0),
    ],
)
def test_a_parameter_that_the_sampler_cannot_take_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(OptionError, match=f"{name}.* is (out of range|not a whole number)"):
        SamplingParams(**{name: value})


def test_the_largest_values_are_taken() -> None:
    params = SamplingParams(max_tokens=2**31 - 1, top_k=2**31 - 1, seed=2**64 - 1, stop_token_ids=[2**31 - 1])
    assert params.seed == 2**64 - 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "a"),
        ("stop", None),
        ("stop", [1]),
        ("stop", [""]),
        ("logit_bias", None),
        ("logit_bias", {1: "much"}),
        ("stop_token_ids", 5),
    ],
)
def test_a_parameter_of_the_wrong_kind_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(OptionError, match=name):
        SamplingParams(**{name: value})  # type: ignore[arg-type]
