"""Tiny random encoders by family and feature, made by `transformers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastserve.types import Float32Array
from tiny_heads import randomize
from tiny_models import BERT_CONFIG

_ALBERT = {
    **BERT_CONFIG,
    "model_type": "albert",
    "embedding_size": 10,
    "hidden_act": "gelu_new",
}
_DISTILBERT = {
    "model_type": "distilbert",
    "vocab_size": 97,
    "dim": 24,
    "hidden_dim": 40,
    "n_layers": 3,
    "n_heads": 4,
    "activation": "gelu",
    "max_position_embeddings": 128,
}

_ROBERTA = {**BERT_CONFIG, "model_type": "roberta", "layer_norm_eps": 1e-5, "max_position_embeddings": 130}
_MPNET = {
    **{key: value for key, value in _ROBERTA.items() if key != "type_vocab_size"},
    "model_type": "mpnet",
    "max_position_embeddings": 200,
}
_MODERNBERT = {
    "model_type": "modernbert",
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "hidden_activation": "gelu",
    "norm_eps": 1e-5,
    "max_position_embeddings": 200,
    "local_attention": 16,
    "pad_token_id": 0,
}

ENCODERS: dict[str, dict[str, Any]] = {
    "bert": BERT_CONFIG,
    "bert, relu": {**BERT_CONFIG, "hidden_act": "relu"},
    "bert, odd widths, tanh gelu": {
        **BERT_CONFIG,
        "hidden_size": 33,
        "num_attention_heads": 3,
        "intermediate_size": 57,
        "hidden_act": "gelu_new",
    },
    "roberta": _ROBERTA,
    "roberta, padding token 0": {**_ROBERTA, "pad_token_id": 0, "hidden_act": "relu"},
    "xlm-roberta": {**_ROBERTA, "model_type": "xlm-roberta", "type_vocab_size": 1},
    "mpnet": _MPNET,
    "mpnet, odd widths, tanh gelu": {
        **_MPNET,
        "hidden_size": 33,
        "num_attention_heads": 3,
        "intermediate_size": 57,
        "hidden_act": "gelu_new",
    },
    "distilbert": _DISTILBERT,
    "distilbert, relu": {**_DISTILBERT, "activation": "relu"},
    "albert": _ALBERT,
    "albert, two groups of weights": {**_ALBERT, "num_hidden_layers": 5, "num_hidden_groups": 2},
    "albert, two layers a group, gelu": {**_ALBERT, "inner_group_num": 2, "hidden_act": "gelu"},
    "modernbert": _MODERNBERT,
    "modernbert, with biases, silu": {
        **_MODERNBERT,
        "norm_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_activation": "silu",
    },
    "modernbert, windows and rope of its own": {
        **_MODERNBERT,
        "local_attention": 7,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
}


def hf_encoder(config: dict[str, Any], *, seed: int = 0) -> Any:
    """The family's model of `transformers` in eval mode, without a pooler; all parameters are random."""
    from transformers import AutoConfig, AutoModel

    options = {key: value for key, value in config.items() if key != "model_type"}
    hf_config = AutoConfig.for_model(config["model_type"], **options)
    try:
        model = AutoModel.from_config(hf_config, add_pooling_layer=False)
    except TypeError:  # a family that has no pooler
        model = AutoModel.from_config(hf_config)
    return randomize(model, seed=seed)


def hf_vectors(
    model: Any, token_ids: Sequence[int], token_types: Sequence[int] | None = None
) -> Float32Array:
    """What `transformers` computes of a text: [tokens, hidden_size]."""
    import torch

    options = {} if token_types is None else {"token_type_ids": torch.tensor([token_types])}
    with torch.no_grad():
        output = model(torch.tensor([token_ids]), **options)
    return np.asarray(output.last_hidden_state[0].numpy())
