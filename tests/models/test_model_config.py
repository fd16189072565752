from __future__ import annotations

from typing import Any

import pytest

from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.models.config import DecoderConfig
from fastserve.models.family import read_config
from tiny_models import BERT_CONFIG, LLAMA_CONFIG


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def test_a_llama_config_is_read() -> None:
    config = read_config(LLAMA_CONFIG)
    assert isinstance(config, DecoderConfig)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (3, 4, 2, 6)
    assert (config.norm_eps, config.activation, config.max_context) == (1e-5, "silu", 512)


def test_keys_that_old_llama_configs_lack_have_the_values_of_their_time() -> None:
    absent = ("num_key_value_heads", "head_dim", "tie_word_embeddings", "attention_bias", "mlp_bias")
    config = DecoderConfig.from_hf(without(LLAMA_CONFIG, *absent, "rope_parameters", "hidden_act"))
    assert (config.num_kv_heads, config.head_dim, config.activation) == (4, 6, "silu")
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (False, False, False)
    assert config.rope.inverse_frequencies == DecoderConfig.from_hf(LLAMA_CONFIG).rope.inverse_frequencies


def test_all_missing_keys_are_named_at_once() -> None:
    with pytest.raises(CheckpointError, match=r"lacks hidden_size, rms_norm_eps \("):
        DecoderConfig.from_hf(without(LLAMA_CONFIG, "hidden_size", "rms_norm_eps"))
    with pytest.raises(CheckpointError, match=r"lacks num_attention_heads, type_vocab_size \("):
        read_config(without(BERT_CONFIG, "type_vocab_size", "num_attention_heads"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", "24"),
        ("num_hidden_layers", 2.5),
        ("vocab_size", True),
        ("rms_norm_eps", "1e-5"),
        ("rms_norm_eps", -1e-5),
        ("rms_norm_eps", float("nan")),
        ("mlp_bias", 1),
    ],
)
def test_an_impossible_value_is_named_with_its_key(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"{key}={value!r}"):
        DecoderConfig.from_hf({**LLAMA_CONFIG, key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads=4, no multiple of num_key_value_heads=3"),
        ({"hidden_size": 25, "head_dim": None}, "hidden_size=25, no multiple of num_attention_heads=4"),
        ({"head_dim": 7}, "even head_dim, not 7"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        DecoderConfig.from_hf({**LLAMA_CONFIG, **changes})


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (LLAMA_CONFIG, {"sliding_window": 4096}),
        (LLAMA_CONFIG, {"hidden_act": "xielu"}),
        (BERT_CONFIG, {"position_embedding_type": "relative_key"}),
        (BERT_CONFIG, {"is_decoder": True}),
        (BERT_CONFIG, {"add_cross_attention": True}),
    ],
)
def test_a_feature_that_we_do_not_compute_is_refused_by_name(
    config: dict[str, Any], changes: dict[str, Any]
) -> None:
    ((key, value),) = changes.items()
    with pytest.raises(UnsupportedError, match=f"{key}={value!r}") as caught:
        read_config({**config, **changes})
    assert caught.value.hint


def test_a_feature_that_is_off_is_not_refused() -> None:
    read_config({**LLAMA_CONFIG, "sliding_window": None})
    read_config({**BERT_CONFIG, "position_embedding_type": "absolute", "is_decoder": False})


def test_an_unknown_architecture_is_named_with_those_we_have() -> None:
    with pytest.raises(UnsupportedError, match="'mamba'") as caught:
        read_config({**LLAMA_CONFIG, "model_type": "mamba"})
    assert caught.value.hint is not None
    named = caught.value.hint.removeprefix("supported are ").split(", ")
    assert {"llama", "bert", "roberta", "xlm-roberta", "mpnet", "distilbert", "albert", "modernbert"} <= set(
        named
    )


def test_a_config_without_model_type_is_refused() -> None:
    with pytest.raises(CheckpointError, match="model_type"):
        read_config(without(LLAMA_CONFIG, "model_type"))
