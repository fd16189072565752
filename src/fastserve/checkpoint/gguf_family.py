"""How the config of each family is said in GGUF, as data: a row for each model_type.

Keys are those of gguf-py/gguf/constants.py, what is computed that of llama-model.cpp (ggml-org/llama.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fastserve.types import JsonObject

Keys = Mapping[str, str | tuple[str, ...]]
Rope = Literal["none", "whole", "partial", "by kind of layer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFamily:
    """One family in GGUF.

    Attributes:
        architecture: its name there.
        keys: key without the architecture → the key of config.json, or the first of several that is there.
        defaults: what config.json may leave out, and llama.cpp would take otherwise.
        fixed: what the code of `transformers` says, whatever config.json does.
        only: key of config.json → the values that llama.cpp computes by; it has no key for others.
        required: keys of config.json that must not be null.
        cycle: a key of config.json, and what it must say of the layers, over and over.
        rope: whether a head turns, whole or in part, or otherwise by the kind of layer.
        old_rope: what of a rotary embedding config.json may say outside `rope_parameters`, by the key there.
        sliding_theta: what config.json calls the base of layers with windows outside `rope_parameters`.
        scalings: kinds of rotary scaling.
        largest: layers of the one model whose queries are scaled by hidden_size / num_attention_heads, all
            others by head_dim: not said in the file. None: of a family without such a thing.
        ignores_window: llama.cpp lets every token attend to all, whatever the file says.
    """

    architecture: str
    keys: Keys
    defaults: JsonObject = field(default_factory=dict)
    fixed: JsonObject = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    cycle: tuple[str, tuple[Any, ...]] | None = None
    rope: Rope = "none"
    old_rope: Keys = field(default_factory=lambda: _OLD_ROPE)
    sliding_theta: str | None = None
    scalings: tuple[str, ...] = ("default",)
    largest: int | None = None
    ignores_window: bool = False


_OLD_ROPE: Keys = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
_SIZES: Keys = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_LLAMA: Keys = {
    **_SIZES,
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads"),
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_LAYER_NORM: Keys = {"attention.layer_norm_epsilon": "layer_norm_eps"}
_WINDOW: Keys = {"attention.sliding_window": "sliding_window"}
_QWEN_EXPERTS: Keys = {
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_BERT: Keys = {**_SIZES, **_LAYER_NORM, "tokenizer.ggml.token_type_count": "type_vocab_size"}

_SILU = {"hidden_act": ("silu",)}
_NO_WINDOWS = {**_SILU, "use_sliding_window": (False, None)}
_ALL_SPARSE: Mapping[str, tuple[Any, ...]] = {
    **_NO_WINDOWS,
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
}
_GEMMA = {
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "attention_bias": (False, None),
    "use_bidirectional_attention": (False, None),
}
_BERT_ONLY = {"hidden_act": ("gelu",), "position_embedding_type": ("absolute", None)}

_FULL, _SLIDING = "full_attention", "sliding_attention"
_SCALINGS = ("default", "linear", "yarn")


def _post_norm(**only: tuple[Any, ...]) -> GgufFamily:
    return GgufFamily(architecture="bert", keys=_BERT, only={**_BERT_ONLY, **only})


FAMILIES: Mapping[str, GgufFamily] = {
    "llama": GgufFamily(
        architecture="llama", keys=_LLAMA, only=_SILU, rope="whole", scalings=(*_SCALINGS, "llama3")
    ),
    "mistral": GgufFamily(
        architecture="llama",
        keys={**_LLAMA, **_WINDOW},
        only={**_SILU, "layer_types": (None,)},
        rope="whole",
        scalings=_SCALINGS,
        ignores_window=True,
    ),
    "mixtral": GgufFamily(
        architecture="llama",
        keys={
            **_LLAMA,
            **_WINDOW,
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
        },
        only=_SILU,
        defaults={"rope_theta": 1_000_000.0},
        rope="whole",
        scalings=_SCALINGS,
        ignores_window=True,
    ),
    "qwen2": GgufFamily(
        architecture="qwen2", keys=_LLAMA, only=_NO_WINDOWS, rope="whole", scalings=_SCALINGS
    ),
    "qwen3": GgufFamily(
        architecture="qwen3",
        keys=_LLAMA,
        only=_NO_WINDOWS,
        defaults={"head_dim": 128},
        rope="whole",
        scalings=_SCALINGS,
    ),
    "qwen2_moe": GgufFamily(
        architecture="qwen2moe",
        keys={
            **_LLAMA,
            **_QWEN_EXPERTS,
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        only={**_ALL_SPARSE, "norm_topk_prob": (False, None)},
        rope="whole",
        scalings=_SCALINGS,
    ),
    "qwen3_moe": GgufFamily(
        architecture="qwen3moe",
        keys={**_LLAMA, **_QWEN_EXPERTS},
        only={**_ALL_SPARSE, "norm_topk_prob": (True,)},
        defaults={"norm_topk_prob": False},
        rope="whole",
        scalings=_SCALINGS,
    ),
    "gemma": GgufFamily(
        architecture="gemma",
        keys=_LLAMA,
        only={**_GEMMA, "hidden_act": ("gelu", "gelu_pytorch_tanh", None)},
        defaults={"head_dim": 256},
        rope="whole",
        scalings=_SCALINGS,
    ),
    "gemma2": GgufFamily(
        architecture="gemma2",
        keys={
            **_LLAMA,
            **_WINDOW,
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        only=_GEMMA,
        defaults={
            "head_dim": 256,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        required=("sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
        cycle=("layer_types", (_SLIDING, _FULL)),
        rope="whole",
        scalings=_SCALINGS,
        largest=46,
    ),
    "gemma3_text": GgufFamily(
        architecture="gemma3",
        keys={**_LLAMA, **_WINDOW, "final_logit_softcapping": "final_logit_softcapping"},
        only={
            **_GEMMA,
            "attn_logit_softcapping": (None,),
            "sliding_window_pattern": (6, None),
            "_sliding_window_pattern": (6, None),
        },
        defaults={
            "head_dim": 256,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        required=("sliding_window",),
        cycle=("layer_types", (*(_SLIDING,) * 5, _FULL)),
        rope="by kind of layer",
        sliding_theta="rope_local_base_freq",
        scalings=("default", "linear"),
        largest=62,
    ),
    "phi3": GgufFamily(
        architecture="phi3",
        keys={**_LLAMA, **_WINDOW},
        only=_SILU,
        defaults={"original_max_position_embeddings": 4096},
        rope="partial",
        scalings=("default", "longrope"),
        ignores_window=True,
    ),
    "smollm3": GgufFamily(
        architecture="smollm3",
        keys=_LLAMA,
        only=_NO_WINDOWS,
        defaults={"rope_theta": 2_000_000.0},
        cycle=("no_rope_layers", (1, 1, 1, 0)),
        rope="whole",
        scalings=_SCALINGS,
    ),
    "gpt2": GgufFamily(
        architecture="gpt2",
        keys={
            "vocab_size": "vocab_size",
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "block_count": "n_layer",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        only={
            "activation_function": ("gelu_new",),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
        },
        defaults={"layer_norm_epsilon": 1e-5, "n_inner": None},
    ),
    "gpt_neox": GgufFamily(
        architecture="gptneox",
        keys={**_SIZES, **_LAYER_NORM, "use_parallel_residual": "use_parallel_residual"},
        only={"hidden_act": ("gelu",)},
        defaults={"use_parallel_residual": True, "rotary_pct": 0.25},
        rope="partial",
        old_rope={
            "rope_theta": ("rope_theta", "rotary_emb_base"),
            "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
        },
        scalings=_SCALINGS,
    ),
    "bert": _post_norm(),
    "roberta": _post_norm(),
    "xlm-roberta": _post_norm(),
    "distilbert": GgufFamily(
        architecture="bert",
        keys={
            "vocab_size": "vocab_size",
            "context_length": "max_position_embeddings",
            "embedding_length": "dim",
            "block_count": "n_layers",
            "feed_forward_length": "hidden_dim",
            "attention.head_count": "n_heads",
            "attention.layer_norm_epsilon": "layer_norm_eps",
            "tokenizer.ggml.token_type_count": "type_vocab_size",
        },
        only={"activation": ("gelu",)},
        fixed={
            "layer_norm_eps": 1e-12,
            "type_vocab_size": 1,  # llama.cpp wants a number, and no table of them
        },
    ),
    "modernbert": GgufFamily(
        architecture="modern-bert",
        keys={
            **_SIZES,
            "attention.layer_norm_epsilon": "norm_eps",
            "attention.sliding_window": "local_attention",
        },
        only={
            "hidden_activation": ("gelu",),
            "norm_bias": (False,),
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "global_attn_every_n_layers": (3, None),
        },
        defaults={
            "local_attention": 128,
            "global_rope_theta": 160_000.0,
            "local_rope_theta": 10_000.0,
        },
        cycle=("layer_types", (_FULL, _SLIDING, _SLIDING)),
        rope="by kind of layer",
        old_rope={"rope_theta": "global_rope_theta"},
        sliding_theta="local_rope_theta",
    ),
    "t5": GgufFamily(
        architecture="t5",
        keys={
            "vocab_size": "vocab_size",
            "context_length": "n_positions",
            "embedding_length": "d_model",
            "block_count": "num_layers",
            "decoder_block_count": ("num_decoder_layers", "num_layers"),
            "feed_forward_length": "d_ff",
            "attention.head_count": "num_heads",
            "attention.key_length": "d_kv",
            "attention.value_length": "d_kv",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
            "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
            "attention.relative_buckets_count": "relative_attention_num_buckets",
            "decoder_start_token_id": "decoder_start_token_id",
        },
        only={
            "feed_forward_proj": ("relu", "gated-gelu"),
            "relative_attention_max_distance": (128,),
        },
        defaults={
            "n_positions": 512,  # what T5 was trained on; its positions have no end
            "layer_norm_epsilon": 1e-6,
            "relative_attention_num_buckets": 32,
        },
    ),
}
