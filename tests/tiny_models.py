"""Tiny random models, made by `transformers`, and what our graphs need of them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np

from fastserve.graph.node import Graph
from fastserve.models.family import build_graph, read_config
from fastserve.models.parameters import expected_parameters
from fastserve.types import Float32Array

LLAMA_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}

BERT_CONFIG: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 128,
    "type_vocab_size": 2,
}


def tiny_graph(config: dict[str, Any]) -> Graph:
    return build_graph(read_config(config))


def random_parameters(graph: Graph, *, seed: int = 0) -> dict[str, Float32Array]:
    """Normal weights, scaled so that values keep their size from layer to layer."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        for name, shape in expected_parameters(graph).items()
    }


def random_language_model(config: Any, kind: Any = None, *, seed: int = 0) -> Any:
    """The causal language model of a config, or a model of another `kind`, in eval mode; all parameters are
    random, biases and norms too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if isinstance(config, dict):
        config = AutoConfig.for_model(**deepcopy(config))
    model = AutoModelForCausalLM.from_config(config) if kind is None else kind(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.normal_(float(is_scale), std=parameter.shape[-1] ** -0.5, generator=generator)
    return model.eval()


def random_encoder_decoder(config: dict[str, Any]) -> Any:
    """A model of `transformers` in eval mode; all that is learned is random, norms and the bias of the logits
    too."""
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    from fastserve.models.marian import sinusoids

    made = AutoConfig.for_model(**deepcopy(config))
    model = AutoModelForSeq2SeqLM.from_config(made)
    random_language_model(made, lambda _: model)
    with torch.no_grad():
        if made.model_type == "marian":
            width = made.d_model
            model.generation_config.bad_words_ids = [[made.pad_token_id]]
            model.final_logits_bias.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
            for stack in (model.model.encoder, model.model.decoder):
                stack.embed_positions.weight.copy_(torch.tensor(sinusoids(0, 128, width)))
        if config.get("tie_word_embeddings") is False:
            head = torch.randn(*model.lm_head.weight.shape, generator=torch.Generator().manual_seed(3)) / 6
            model.lm_head.weight = torch.nn.Parameter(head)
        model.get_output_embeddings().weight[made.eos_token_id] *= 8  # so that some texts end
    return model.eval()


def hf_model(config: dict[str, Any], *, seed: int = 0) -> Any:
    """A `LlamaForCausalLM` or `BertModel` in eval mode; all parameters are random, biases and norms too."""
    import torch
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    options = {key: value for key, value in config.items() if key != "model_type"}
    if config["model_type"] == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**options))
    else:
        model = BertModel(BertConfig(**options), add_pooling_layer=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = "norm.weight" in name.lower()
            parameter.normal_(float(is_scale), std=parameter.shape[-1] ** -0.5, generator=generator)
    return model.eval()


def hf_parameters(model: Any) -> dict[str, Float32Array]:
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
