from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.graph.node import RopeTable
from fastserve.models.rope import RopeTables, read_rope

MAX_CONTEXT = 131072
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.0},
    LLAMA3,
]
YARNS: dict[str, dict[str, Any]] = {
    "as Qwen2.5 has it": YARN,
    "factor from the contexts": {**YARN, "factor": None},
    "own betas, not truncated": {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    "mscales": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0},
    "own scale": {**YARN, "attention_factor": 1.5},
}


def hf_table(parameters: dict[str, Any], head_dim: int, seq_len: int | None = None) -> RopeTable:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(head_dim=head_dim, rope_parameters=parameters, max_position_embeddings=MAX_CONTEXT)
    if parameters["rope_type"] == "default":
        rotary = LlamaRotaryEmbedding(config)
        frequencies, scale = rotary.inv_freq, rotary.attention_scaling
    else:
        frequencies, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=seq_len)
    return RopeTable(head_dim, tuple(frequencies.tolist()), scale)


def our_tables(parameters: dict[str, Any], head_dim: int) -> RopeTables:
    return read_rope({"rope_parameters": parameters, "max_position_embeddings": MAX_CONTEXT}, head_dim)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: str(scaling["rope_type"]))
@pytest.mark.parametrize(("theta", "head_dim"), [(10000.0, 8), (100000.0, 64), (500000.0, 128)])
def test_frequencies_of_models_in_use_are_bit_equal_to_those_of_transformers(
    scaling: dict[str, Any], theta: float, head_dim: int
) -> None:
    parameters = {**scaling, "rope_theta": theta}
    assert our_tables(parameters, head_dim) == RopeTables(hf_table(parameters, head_dim))


@pytest.mark.parametrize("name", YARNS)
@pytest.mark.parametrize(("theta", "head_dim"), [(10000.0, 8), (1e6, 64), (1e6, 128)])
def test_yarn_stretches_as_transformers_does(name: str, theta: float, head_dim: int) -> None:
    parameters = {**YARNS[name], "rope_theta": theta}
    ours, theirs = our_tables(parameters, head_dim).usual, hf_table(parameters, head_dim)
    assert ours.scale == theirs.scale
    np.testing.assert_array_max_ulp(
        np.array(ours.inverse_frequencies, np.float32), np.array(theirs.inverse_frequencies, np.float32), 4
    )


@pytest.mark.parametrize("factor", [None, 1.0, 8.0])
def test_longrope_has_a_table_for_short_texts_and_one_for_long_ones(factor: float | None) -> None:
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [1.1, 2.0, 10.0, 60.0]}
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 4096,
        "factor": factor,
        **factors,
    }
    ours = our_tables(parameters, 8)
    assert ours == RopeTables(hf_table(parameters, 8), hf_table(parameters, 8, seq_len=4097), 4096)
    assert ours.for_context(4096) == RopeTables(ours.usual)
    assert ours.long is not None
    assert ours.for_context(4097) == RopeTables(ours.long)


def test_frequencies_are_within_two_float32_steps_at_any_dim() -> None:
    for head_dim in range(2, 258, 2):
        expected = hf_table({"rope_type": "default", "rope_theta": 10000.0}, head_dim).inverse_frequencies
        actual = read_rope({"rope_theta": 10000.0}, head_dim).usual.inverse_frequencies
        np.testing.assert_array_max_ulp(np.array(actual, np.float32), np.array(expected, np.float32), 2)


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_the_older_form_means_the_same(kind: str) -> None:
    scaling = {kind: "linear", "factor": 3.0}
    older = read_rope({"rope_theta": 5e5, "rope_scaling": scaling}, 16)
    assert older == read_rope(
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5e5}}, 16
    )
    assert older != read_rope({"rope_theta": 5e5, "rope_scaling": None}, 16)


def test_other_scalings_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="'proportional'") as caught:
        read_rope({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, 16)
    assert caught.value.hint == "supported are default, linear, dynamic, yarn, longrope, llama3"


def test_a_parameter_that_we_do_not_know_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"mrope_section=\[8, 12\]"):
        read_rope({"rope_scaling": {"rope_type": "default", "mrope_section": [8, 12]}}, 16)


def test_a_part_of_a_head_turns_only_in_families_that_have_it() -> None:
    config = {"partial_rotary_factor": 0.5}
    assert read_rope(config, 16, partial=1.0).usual == read_rope({}, 8).usual
    assert read_rope({}, 16, partial=0.25).usual == read_rope({}, 4).usual
    with pytest.raises(UnsupportedError, match=r"partial_rotary_factor=0\.5"):
        read_rope(config, 16)


@pytest.mark.parametrize("share", [0, 1.5, "0.5", True, float("nan")])
def test_an_impossible_share_of_rotary_dimensions_is_named(share: object) -> None:
    with pytest.raises(CheckpointError, match=f"partial_rotary_factor={share!r}"):
        read_rope({"partial_rotary_factor": share}, 16, partial=1.0)


@pytest.mark.parametrize("key", ["factor", "low_freq_factor"])
@pytest.mark.parametrize("value", [None, 0, "8", True, float("inf")])
def test_a_missing_or_impossible_parameter_is_named(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"{key}={value!r}"):
        read_rope({"rope_scaling": {**LLAMA3, key: value}}, 16)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([1.0] * 7, "have 7 numbers in short_factor; 8 were expected"),
        ([1.0] * 7 + [0.0], "need a list of positive numbers in short_factor"),
        (None, "need a list of positive numbers in short_factor"),
    ],
)
def test_factors_that_do_not_fit_are_named(factors: object, message: str) -> None:
    parameters = {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": [1.0] * 8,
        "original_max_position_embeddings": 64,
    }
    with pytest.raises(CheckpointError, match=message):
        our_tables(parameters, 16)


def test_scalings_by_logarithms_refuse_what_has_none() -> None:
    with pytest.raises(CheckpointError, match="rope_theta above 1, not 1"):
        our_tables({**YARN, "rope_theta": 1.0}, 16)
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 1}
    with pytest.raises(CheckpointError, match="original_max_position_embeddings above 1, not 1"):
        our_tables(longrope, 16)


def test_llama3_bands_that_cross_are_refused() -> None:
    with pytest.raises(CheckpointError, match="high_freq_factor=1, which must be above low_freq_factor=1"):
        read_rope({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, 16)


def test_rope_parameters_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(CheckpointError, match="must be a mapping"):
        read_rope({"rope_scaling": "linear"}, 16)
