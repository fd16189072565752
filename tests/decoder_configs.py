"""Tiny configs of every decoder family, one for each feature that changes what is computed."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

_SIZES: Config = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _rope(kind: str, **parameters: Any) -> Config:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


LLAMA: Config = {"model_type": "llama", **_SIZES, "rms_norm_eps": 1e-5, "rope_parameters": _PLAIN_ROPE}
MISTRAL: Config = {**LLAMA, "model_type": "mistral", "head_dim": 8, "sliding_window": None}
QWEN2: Config = {**LLAMA, "model_type": "qwen2"}
QWEN3: Config = {**LLAMA, "model_type": "qwen3", "head_dim": 10}
PHI3: Config = {**LLAMA, "model_type": "phi3"}
SMOLLM3: Config = {**LLAMA, "model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layer_interval": 2}
GEMMA: Config = {**LLAMA, "model_type": "gemma", "head_dim": 10}
GEMMA2: Config = {
    **GEMMA,
    "model_type": "gemma2",
    "query_pre_attn_scalar": 24,
    "sliding_window": 9,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
GEMMA3: Config = {
    **GEMMA,
    "model_type": "gemma3_text",
    "num_hidden_layers": 4,
    "query_pre_attn_scalar": 24,
    "sliding_window": 9,
    "sliding_window_pattern": 2,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
    },
}
GPT2: Config = {
    "model_type": "gpt2",
    "vocab_size": 97,
    "n_positions": 512,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}
NEOX: Config = {
    **{key: value for key, value in _SIZES.items() if key != "num_key_value_heads"},
    "model_type": "gpt_neox",
    "layer_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}
OPT: Config = {
    **{
        key: value for key, value in _SIZES.items() if key not in ("num_key_value_heads", "intermediate_size")
    },
    "model_type": "opt",
    "ffn_dim": 40,
    "word_embed_proj_dim": 32,
}

MIXTRAL: Config = {**LLAMA, "model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2}
QWEN2_MOE: Config = {
    **LLAMA,
    "model_type": "qwen2_moe",
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
}
QWEN3_MOE: Config = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "head_dim": 10,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}

_LONG_FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.5, 2.5, 4.0, 7.0]}

# What is in the name is what differs from the family's plain form.
DECODERS: dict[str, Config] = {
    "llama, dynamic rope": {**LLAMA, **_rope("dynamic", factor=2.0)},
    "llama, yarn rope": {**LLAMA, **_rope("yarn", factor=4.0, original_max_position_embeddings=64)},
    "llama, yarn rope by mscales": {
        **LLAMA,
        **_rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=64,
            mscale=1.0,
            mscale_all_dim=0.5,
            beta_fast=8,
            beta_slow=2,
        ),
    },
    "llama, longrope": {
        **LLAMA,
        **_rope("longrope", original_max_position_embeddings=256, factor=2.0, **_LONG_FACTORS),
    },
    "mistral": MISTRAL,
    "mistral, window": {**MISTRAL, "sliding_window": 11},
    "qwen2": QWEN2,
    "qwen2, tied, windows": {
        **QWEN2,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
    },
    "qwen3": QWEN3,
    "qwen3, biases, windows by layer": {
        **QWEN3,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma2, without caps": {
        **GEMMA2,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": True,
    },
    "gemma3": GEMMA3,
    "gemma3, capped logits, heads of 256": {
        **GEMMA3,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "final_logit_softcapping": 3.0,
    },
    "phi3": PHI3,
    "phi3, window, partial rotary": {
        **PHI3,
        "sliding_window": 13,
        **_rope("default", partial_rotary_factor=0.5),
    },
    "phi3, longrope": {
        **PHI3,
        "original_max_position_embeddings": 256,
        **_rope("longrope", **_LONG_FACTORS),
    },
    "smollm3": SMOLLM3,
    "smollm3, windows": {**SMOLLM3, "use_sliding_window": True, "sliding_window": 6},
    "mixtral": MIXTRAL,
    "mixtral, window, one expert": {**MIXTRAL, "sliding_window": 11, "num_experts_per_tok": 1},
    "qwen2_moe": QWEN2_MOE,
    "qwen2_moe, normalized, windows, every second layer": {
        **QWEN2_MOE,
        "num_hidden_layers": 4,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 3,
        "qkv_bias": False,
    },
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe, not normalized, window, a plain layer": {
        **QWEN3_MOE,
        "norm_topk_prob": False,
        "mlp_only_layers": [1],
        "use_sliding_window": True,
        "sliding_window": 9,
    },
    "gpt2": GPT2,
    "gpt2, untied, scaled by layer": {
        **GPT2,
        "tie_word_embeddings": False,
        "scale_attn_by_inverse_layer_idx": True,
        "scale_attn_weights": False,
        "n_inner": 52,
        "activation_function": "relu",
    },
    "gpt_neox": NEOX,
    "gpt_neox, one after the other, tied": {
        **NEOX,
        "use_parallel_residual": False,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "rope_parameters": {**_PLAIN_ROPE, "partial_rotary_factor": 1.0},
    },
    "opt": OPT,
    "opt, normed after, projected": {
        **OPT,
        "do_layer_norm_before": False,
        "word_embed_proj_dim": 20,
        "activation_function": "gelu",
    },
    "opt, untied, without biases": {**OPT, "tie_word_embeddings": False, "enable_bias": False},
}
