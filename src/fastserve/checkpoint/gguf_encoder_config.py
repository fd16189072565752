"""The config.json of the encoder, or encoder-decoder, in a GGUF file, from its metadata. As `gguf_config`."""

from __future__ import annotations

from fastserve.checkpoint.gguf import GgufFile
from fastserve.checkpoint.gguf_sizes import read_count, read_positive, read_sizes, read_token_ids
from fastserve.errors import UnsupportedError
from fastserve.types import JsonObject

_MODERNBERT_INTERVAL = 3  # llama-model.cpp, swa_period
_DISTILBERT_EPS = 1e-12  # in the code of transformers
_T5_DISTANCE = 128  # llama-graph.cpp, llama_relative_position_bucket


def read_bert(file: GgufFile) -> JsonObject:
    """BERT, and RoBERTa, which is one without the rows for padding; without token types, DistilBERT."""
    config, metadata = read_sizes(file), file.metadata
    eps = read_positive(metadata, "bert.attention.layer_norm_epsilon")
    if (token_types := file.tensors.get("token_types.weight")) is not None:
        return {
            "architectures": ["BertModel"],
            "model_type": "bert",
            **config,
            "hidden_act": "gelu",
            "layer_norm_eps": eps,
            "type_vocab_size": token_types.shape[0] if len(token_types.shape) == 2 else 1,
        }
    if eps != _DISTILBERT_EPS:
        raise UnsupportedError(
            f"{file.path} has no token types and layer_norm_epsilon {eps}; DistilBERT's is {_DISTILBERT_EPS}"
        )
    return {
        "architectures": ["DistilBertModel"],
        "model_type": "distilbert",
        "vocab_size": config["vocab_size"],
        "dim": config["hidden_size"],
        "hidden_dim": config["intermediate_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "max_position_embeddings": config["max_position_embeddings"],
        "activation": "gelu",
        **read_token_ids(metadata),
    }


def read_modernbert(file: GgufFile) -> JsonObject:
    """Every third layer sees all, the first one of them, as in llama-model.cpp."""
    metadata = file.metadata
    layers = read_sizes(file)
    pattern = metadata.integer("modern-bert.attention.sliding_window_pattern")
    if pattern not in (None, _MODERNBERT_INTERVAL):
        raise UnsupportedError(f"{file.path} has windows in another pattern than every third layer")
    thetas = {
        kind: metadata.number(f"modern-bert.rope.{key}") or default
        for kind, key, default in (
            ("full_attention", "freq_base", 160_000.0),
            ("sliding_attention", "freq_base_swa", 10_000.0),
        )
    }
    return {
        "architectures": ["ModernBertModel"],
        "model_type": "modernbert",
        **layers,
        "hidden_activation": "gelu",
        "norm_eps": read_positive(metadata, "modern-bert.attention.layer_norm_epsilon"),
        "local_attention": read_count(metadata, "modern-bert.attention.sliding_window"),
        "global_attn_every_n_layers": _MODERNBERT_INTERVAL,
        "norm_bias": "output_norm.bias" in file.tensors,
        "attention_bias": "blk.0.attn_qkv.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()
        },
    }


def read_t5(file: GgufFile) -> JsonObject:
    """llama.cpp does not scale what the head gives, and knows distances up to 128."""
    config, metadata = read_sizes(file), file.metadata
    is_gated = "enc.blk.0.ffn_gate.weight" in file.tensors
    ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
    start = metadata.integer("t5.decoder_start_token_id")
    num_layers = config["num_hidden_layers"]
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config["vocab_size"],
        "d_model": config["hidden_size"],
        "d_kv": read_count(metadata, "t5.attention.key_length"),
        "d_ff": config["intermediate_size"],
        "num_layers": num_layers,
        "num_decoder_layers": metadata.integer("t5.decoder_block_count") or num_layers,
        "num_heads": config["num_attention_heads"],
        "n_positions": config["max_position_embeddings"],
        "feed_forward_proj": "gated-gelu" if is_gated else "relu",
        "relative_attention_num_buckets": read_count(metadata, "t5.attention.relative_buckets_count"),
        "relative_attention_max_distance": _T5_DISTANCE,
        "layer_norm_epsilon": read_positive(metadata, "t5.attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "scale_decoder_outputs": False,
        **ids,
        "decoder_start_token_id": ids["pad_token_id"] if start is None else start,
    }
