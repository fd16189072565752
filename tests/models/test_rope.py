from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.models.rope import read_rope_table

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    LLAMA3,
]


def hf_frequencies(parameters: dict[str, Any], head_dim: int) -> np.ndarray:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(head_dim=head_dim, rope_parameters=parameters, max_position_embeddings=131072)
    rotary = LlamaRotaryEmbedding(config)
    assert rotary.attention_scaling == 1.0
    return np.asarray(rotary.inv_freq.numpy())


def our_frequencies(config: dict[str, Any], head_dim: int) -> np.ndarray:
    table = read_rope_table(config, head_dim)
    assert (table.dim, table.scale) == (head_dim, 1.0)
    return np.array(table.inverse_frequencies, np.float32)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: str(scaling["rope_type"]))
@pytest.mark.parametrize(("theta", "head_dim"), [(10000.0, 8), (100000.0, 64), (500000.0, 128)])
def test_frequencies_of_models_in_use_are_bit_equal_to_those_of_transformers(
    scaling: dict[str, Any], theta: float, head_dim: int
) -> None:
    parameters = {**scaling, "rope_theta": theta}
    expected = hf_frequencies(parameters, head_dim)
    np.testing.assert_array_equal(our_frequencies({"rope_parameters": parameters}, head_dim), expected)


def test_frequencies_are_within_two_float32_steps_at_any_dim() -> None:
    for head_dim in range(2, 258, 2):
        expected = hf_frequencies({"rope_type": "default", "rope_theta": 10000.0}, head_dim)
        np.testing.assert_array_max_ulp(our_frequencies({"rope_theta": 10000.0}, head_dim), expected, 2)


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_the_older_form_means_the_same(kind: str) -> None:
    scaling = {kind: "linear", "factor": 3.0}
    older = read_rope_table({"rope_theta": 5e5, "rope_scaling": scaling}, 16)
    assert older == read_rope_table(
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5e5}}, 16
    )
    assert older != read_rope_table({"rope_theta": 5e5, "rope_scaling": None}, 16)


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope"])
def test_other_scalings_are_refused_by_name(kind: str) -> None:
    with pytest.raises(UnsupportedError, match=repr(kind)) as caught:
        read_rope_table({"rope_scaling": {"rope_type": kind, "factor": 2.0}}, 16)
    assert caught.value.hint == "supported are default, linear, llama3"


def test_partial_rotation_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"partial_rotary_factor=0\.5"):
        read_rope_table({"partial_rotary_factor": 0.5}, 16)


@pytest.mark.parametrize("key", ["factor", "low_freq_factor", "original_max_position_embeddings"])
@pytest.mark.parametrize("value", [None, 0, "8", True])
def test_a_missing_or_impossible_parameter_is_named(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"{key}={value!r}"):
        read_rope_table({"rope_scaling": {**LLAMA3, key: value}}, 16)


def test_llama3_bands_that_cross_are_refused() -> None:
    with pytest.raises(CheckpointError, match="high_freq_factor=1, which must be above low_freq_factor=1"):
        read_rope_table({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, 16)


def test_rope_parameters_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(CheckpointError, match="must be a mapping"):
        read_rope_table({"rope_scaling": "linear"}, 16)
