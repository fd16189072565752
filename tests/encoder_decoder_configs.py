"""Configs of tiny encoder-decoders: every family and every feature of it."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

T5: Config = {
    "model_type": "t5",
    "vocab_size": 97,
    "d_model": 32,
    "d_kv": 10,
    "d_ff": 40,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
MARIAN: Config = {
    "model_type": "marian",
    "vocab_size": 97,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 44,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 128,
    "decoder_start_token_id": 96,
    "pad_token_id": 96,
    "eos_token_id": 0,
    "forced_eos_token_id": 0,
}

# Sources and targets with a vocabulary each.
TWO_VOCABULARIES: dict[str, Config] = {
    "marian, two vocabularies": {
        **MARIAN,
        "share_encoder_decoder_embeddings": False,
        "decoder_vocab_size": 120,
        "scale_embedding": True,
    },
    "marian, two vocabularies, own head": {
        **MARIAN,
        "share_encoder_decoder_embeddings": False,
        "decoder_vocab_size": 120,
        "tie_word_embeddings": False,
    },
}

# What is in the name is what differs from the family's plain form.
ENCODER_DECODERS: dict[str, Config] = {
    "t5": T5,
    "t5, gelu": {**T5, "feed_forward_proj": "gelu", "layer_norm_epsilon": 1e-5},
    "t5 v1.1, gated gelu, own head": {
        **T5,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "num_decoder_layers": 3,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
    },
    "t5, gated silu": {**T5, "feed_forward_proj": "gated-silu"},
    "marian": MARIAN,
    "marian, scaled embeddings, swish": {
        **MARIAN,
        "scale_embedding": True,
        "activation_function": "swish",
        "decoder_layers": 1,
    },
}
