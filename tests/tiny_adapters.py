"""Tiny random models, and random adapters that peft saves for them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

VOCAB = 64
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}
_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": None,
}
_GPT_NEOX = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_ALL = "all-linear"

# By name: a class, its config, what an adapter of it changes.
MODELS: dict[str, tuple[Any, Callable[[], Any], dict[str, Any]]] = {
    "llama": (
        transformers.LlamaForCausalLM,
        lambda: transformers.LlamaConfig(**_LLAMA),
        {"target_modules": _ALL},
    ),
    # The middle of three merged matrices is left alone; ranks and scales differ.
    "patterns": (
        transformers.LlamaForCausalLM,
        lambda: transformers.LlamaConfig(**_LLAMA | {"tie_word_embeddings": True}),
        {
            "target_modules": ["q_proj", "v_proj", "up_proj", "lm_head"],
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"model.layers.1.self_attn.q_proj": 3},
            "use_rslora": True,
        },
    ),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        lambda: transformers.GPT2Config(**_GPT2),
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "gpt_neox": (
        transformers.GPTNeoXForCausalLM,
        lambda: transformers.GPTNeoXConfig(**_GPT_NEOX),
        {"target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]},
    ),
    # Rows of several matrices and their biases are scaled, one of which is the tied head.
    "dora": (
        transformers.Qwen2ForCausalLM,
        lambda: transformers.Qwen2Config(**_LLAMA | {"tie_word_embeddings": True}),
        {"target_modules": ["q_proj", "v_proj", "o_proj", "down_proj", "lm_head"], "use_dora": True},
    ),
    "gpt2 dora": (
        transformers.GPT2LMHeadModel,
        lambda: transformers.GPT2Config(**_GPT2),
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "gpt_neox dora": (
        transformers.GPTNeoXForCausalLM,
        lambda: transformers.GPTNeoXConfig(**_GPT_NEOX),
        {"target_modules": ["query_key_value", "dense"], "use_dora": True, "use_rslora": True},
    ),
    # Heads that the adapter has in place of the model's.
    "own head": (
        transformers.LlamaForCausalLM,
        lambda: transformers.LlamaConfig(**_LLAMA),
        {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head"]},
    ),
    "llama classifier": (
        transformers.LlamaForSequenceClassification,
        lambda: transformers.LlamaConfig(**_LLAMA, num_labels=3, pad_token_id=0),
        {"target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS"},
    ),
    "bert classifier": (
        transformers.BertForSequenceClassification,
        lambda: transformers.BertConfig(**_BERT, num_labels=3),
        {"target_modules": _ALL, "task_type": "SEQ_CLS"},
    ),
    "bert tags, dora": (
        transformers.BertForTokenClassification,
        lambda: transformers.BertConfig(**_BERT, num_labels=5),
        {"target_modules": ["query", "dense"], "use_dora": True, "task_type": "TOKEN_CLS"},
    ),
    "roberta classifier": (  # a head of two layers
        transformers.RobertaForSequenceClassification,
        lambda: transformers.RobertaConfig(**_BERT, num_labels=2),
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    ),
    "bert": (transformers.BertModel, lambda: transformers.BertConfig(**_BERT), {"target_modules": _ALL}),
    "albert": (
        transformers.AlbertModel,
        lambda: transformers.AlbertConfig(**_BERT, embedding_size=16),
        {"target_modules": ["query", "value", "ffn"]},
    ),
}


def make_model(folder: Path, name: str) -> Any:
    """A random model, saved in the folder, whose logits are far enough apart to tell them."""
    class_, config, _ = MODELS[name]
    torch.manual_seed(0)
    model = class_(config()).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
        elif not (parameter == 1).all():  # biases
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return model


def make_adapter(folder: Path, model: Any, name: str, *, seed: int, rank: int = 4, **config: Any) -> Any:
    """A random adapter of that model, saved in the folder; the model with it, merged."""
    torch.manual_seed(seed)
    task_type = "CAUSAL_LM" if hasattr(model, "lm_head") or hasattr(model, "embed_out") else None
    settings = peft.LoraConfig(r=rank, lora_alpha=6, **{"task_type": task_type} | MODELS[name][2] | config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft's about transformers, and tied heads
        wrapped = peft.get_peft_model(copy.deepcopy(model), settings)
        for parameter_name, parameter in wrapped.named_parameters():
            if "magnitude" in parameter_name:
                parameter.data *= torch.rand_like(parameter) + 0.5
            elif "lora_" in parameter_name or "modules_to_save" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.2)
        wrapped.save_pretrained(folder, save_embedding_layers=False)
    return wrapped.eval()


def make_stories_adapter(folder: Path, stories: Path, *, seed: int, **config: Any) -> Path:
    """A random adapter of the model that writes stories, strong enough to change what it writes."""
    model = transformers.LlamaForCausalLM.from_pretrained(stories)
    make_adapter(folder, model, "llama", seed=seed, **config)
    return folder
