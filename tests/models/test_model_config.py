from __future__ import annotations

import re
from typing import Any

import pytest

from decoder_configs import DECODERS
from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.models.family import read_config
from fastserve.models.llama import LlamaConfig, read_llama
from tiny_models import BERT_CONFIG, LLAMA_CONFIG


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def test_a_llama_config_is_read() -> None:
    config = read_config(LLAMA_CONFIG)
    assert isinstance(config, LlamaConfig)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (3, 4, 2, 6)
    assert (config.norm_eps, config.activation, config.max_context) == (1e-5, "silu", 512)


def test_keys_that_old_llama_configs_lack_have_the_values_of_their_time() -> None:
    absent = ("num_key_value_heads", "head_dim", "tie_word_embeddings", "attention_bias", "mlp_bias")
    config = read_llama(without(LLAMA_CONFIG, *absent, "rope_parameters", "hidden_act"))
    assert (config.num_kv_heads, config.head_dim, config.activation) == (4, 6, "silu")
    assert (config.tie_word_embeddings, config.has_qkv_bias, config.has_mlp_bias) == (False, False, False)
    assert config.layers == read_llama(LLAMA_CONFIG).layers


def test_all_missing_keys_are_named_at_once() -> None:
    with pytest.raises(CheckpointError, match=r"lacks hidden_size, rms_norm_eps \("):
        read_llama(without(LLAMA_CONFIG, "hidden_size", "rms_norm_eps"))
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
        read_llama({**LLAMA_CONFIG, key: value})


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
        read_llama({**LLAMA_CONFIG, **changes})


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
    assert caught.value.hint.endswith("; docs/guides/add-a-model.md says how to add one")
    named = caught.value.hint.removeprefix("supported are ").partition(";")[0].split(", ")
    assert {"llama", "bert", "roberta", "xlm-roberta", "mpnet", "distilbert", "albert", "modernbert"} <= set(
        named
    )


def test_a_model_that_brings_its_own_code_is_refused_by_name() -> None:
    auto_map = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    with pytest.raises(UnsupportedError, match=r"'own_model' .* its own code \(auto_map\)"):
        read_config({**LLAMA_CONFIG, "model_type": "own_model", "auto_map": auto_map})
    own_class = {"architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    for config in (LLAMA_CONFIG, BERT_CONFIG):
        with pytest.raises(UnsupportedError, match=r"'OwnForCausalLM', its own code \(auto_map\)"):
            read_config({**config, **own_class})


def test_code_beside_a_class_that_transformers_has_too_is_not_needed() -> None:
    auto_map = {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}
    read_config({**LLAMA_CONFIG, "architectures": ["LlamaForCausalLM"], "auto_map": auto_map})


def test_a_class_with_another_head_is_not_read_as_a_language_model() -> None:
    read_config({**LLAMA_CONFIG, "architectures": ["LlamaForSequenceClassification"]})
    with pytest.raises(UnsupportedError, match="'LlamaForTokenClassification'") as caught:
        read_config({**LLAMA_CONFIG, "architectures": ["LlamaForTokenClassification"]})
    supported = "LlamaForCausalLM, LlamaForSequenceClassification"
    assert caught.value.hint == f"supported for model_type='llama' is {supported}"


@pytest.mark.parametrize("name", DECODERS)
def test_every_family_names_all_that_its_config_lacks(name: str) -> None:
    model_type = DECODERS[name]["model_type"]
    with pytest.raises(CheckpointError, match="lacks vocab_size, "):
        read_config({"model_type": model_type})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"layer_types": ["full_attention"]}),
        ("gemma2", {"use_bidirectional_attention": True}),
        ("gemma3", {"attn_logit_softcapping": 50.0}),
        ("gemma3", {"hidden_activation": "xielu"}),
        ("gpt2", {"add_cross_attention": True}),
        ("gpt2", {"activation_function": "quick_gelu"}),
        ("opt", {"layer_norm_elementwise_affine": False}),
    ],
)
def test_a_variation_that_a_family_does_not_compute_is_refused_by_name(
    name: str, changes: dict[str, Any]
) -> None:
    ((key, value),) = changes.items()
    with pytest.raises(UnsupportedError, match=re.escape(f"{key}={value!r}")):
        read_config({**DECODERS[name], **changes})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3, biases, windows by layer", {"layer_types": ["full_attention"]}, "each of its 3 layers"),
        ("gemma3", {"rope_parameters": {"rope_theta": 1e4}}, "for full_attention and sliding_attention"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers for each of its 4 layers"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0"),
        ("gemma2", {"final_logit_softcapping": -1}, "final_logit_softcapping=-1"),
        ("gpt2", {"n_head": 5}, "n_embd=32, no multiple of n_head=5"),
    ],
)
def test_what_is_inconsistent_in_a_family_is_named(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_config({**DECODERS[name], **changes})


def test_a_kind_of_layer_that_we_do_not_compute_is_refused_by_name() -> None:
    kinds = ["chunked_attention", "full_attention", "full_attention"]
    with pytest.raises(UnsupportedError, match="'chunked_attention'"):
        read_config({**DECODERS["qwen3, biases, windows by layer"], "layer_types": kinds})


def test_a_window_that_holds_the_whole_context_is_none() -> None:
    config = read_config({**DECODERS["mistral"], "sliding_window": 512})
    assert config == read_config(DECODERS["mistral"])
    assert config != read_config({**DECODERS["mistral"], "sliding_window": 511})


def test_windows_that_are_switched_off_are_none() -> None:
    config = DECODERS["qwen2"]
    assert read_config({**config, "use_sliding_window": False, "sliding_window": 7}) == read_config(config)


def test_gemma3_as_its_first_files_have_it_means_the_same() -> None:
    newer = DECODERS["gemma3"]
    older = {
        **without(newer, "rope_parameters"),
        "rope_theta": 100000.0,
        "rope_local_base_freq": 1000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    }
    assert read_config(older) == read_config(newer)


@pytest.mark.parametrize("older", ["su", "yarn"])
def test_longrope_of_the_first_phi3_files_means_the_same(older: str) -> None:
    newer = DECODERS["phi3, longrope"]
    factors = {key: newer["rope_parameters"][key] for key in ("short_factor", "long_factor")}
    config = {
        **without(newer, "rope_parameters"),
        "rope_theta": 10000.0,
        "rope_scaling": {"type": older, **factors},
    }
    assert read_config(config) == read_config(newer)


def test_longrope_counts_texts_as_short_up_to_its_original_context() -> None:
    config = read_config(DECODERS["phi3, longrope"])
    assert isinstance(config, LlamaConfig)
    assert (config.max_context, config.usual_context) == (512, 256)
    assert read_llama(LLAMA_CONFIG).usual_context == 512


def test_pythia_as_its_files_have_it_means_the_same() -> None:
    newer = DECODERS["gpt_neox"]
    older = {**without(newer, "rope_parameters"), "rotary_pct": 0.25, "rotary_emb_base": 10000}
    assert read_config(older) == read_config(newer)


def test_a_config_without_model_type_is_refused() -> None:
    with pytest.raises(CheckpointError, match="model_type"):
        read_config(without(LLAMA_CONFIG, "model_type"))
