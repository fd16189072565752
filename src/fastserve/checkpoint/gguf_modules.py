"""Which module of a Hugging Face model is called what in GGUF, as data, and the way from either name to the
other.

Source of GGUF's names: gguf-py/gguf/constants.py and tensor_mapping.py of ggml-org/llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

from fastserve.types import JsonObject

Modules = Mapping[str, str]

# GGUF's name → Hugging Face's. The first {} is the index of the layer, the second that of an expert: one
# tensor there holds those of all experts.
_LLAMA: Modules = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}
_QK_NORMS: Modules = {
    "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
}
_MIXTRAL_EXPERTS: Modules = {
    "blk.{}.ffn_gate_inp": "model.layers.{}.block_sparse_moe.gate",
    "blk.{}.ffn_gate_exps": "model.layers.{}.block_sparse_moe.experts.{}.w1",
    "blk.{}.ffn_up_exps": "model.layers.{}.block_sparse_moe.experts.{}.w3",
    "blk.{}.ffn_down_exps": "model.layers.{}.block_sparse_moe.experts.{}.w2",
}
_QWEN_EXPERTS: Modules = {
    "blk.{}.ffn_gate_inp": "model.layers.{}.mlp.gate",
    "blk.{}.ffn_gate_exps": "model.layers.{}.mlp.experts.{}.gate_proj",
    "blk.{}.ffn_up_exps": "model.layers.{}.mlp.experts.{}.up_proj",
    "blk.{}.ffn_down_exps": "model.layers.{}.mlp.experts.{}.down_proj",
}
_QWEN_SHARED_EXPERT: Modules = {
    "blk.{}.ffn_gate_inp_shexp": "model.layers.{}.mlp.shared_expert_gate",
    "blk.{}.ffn_gate_shexp": "model.layers.{}.mlp.shared_expert.gate_proj",
    "blk.{}.ffn_up_shexp": "model.layers.{}.mlp.shared_expert.up_proj",
    "blk.{}.ffn_down_shexp": "model.layers.{}.mlp.shared_expert.down_proj",
}
_GEMMA2: Modules = {
    **_LLAMA,
    "blk.{}.post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    "blk.{}.post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}
_PHI3: Modules = {
    **_LLAMA,
    "blk.{}.attn_qkv": "model.layers.{}.self_attn.qkv_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.gate_up_proj",
}
_GPT2: Modules = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "blk.{}.attn_norm": "transformer.h.{}.ln_1",
    "blk.{}.attn_qkv": "transformer.h.{}.attn.c_attn",
    "blk.{}.attn_output": "transformer.h.{}.attn.c_proj",
    "blk.{}.ffn_norm": "transformer.h.{}.ln_2",
    "blk.{}.ffn_up": "transformer.h.{}.mlp.c_fc",
    "blk.{}.ffn_down": "transformer.h.{}.mlp.c_proj",
}
_GPTNEOX: Modules = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
    "blk.{}.attn_norm": "gpt_neox.layers.{}.input_layernorm",
    "blk.{}.attn_qkv": "gpt_neox.layers.{}.attention.query_key_value",
    "blk.{}.attn_output": "gpt_neox.layers.{}.attention.dense",
    "blk.{}.ffn_norm": "gpt_neox.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
    "blk.{}.ffn_down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
}
_BERT: Modules = {
    "token_embd": "embeddings.word_embeddings",
    "position_embd": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
    "blk.{}.attn_q": "encoder.layer.{}.attention.self.query",
    "blk.{}.attn_k": "encoder.layer.{}.attention.self.key",
    "blk.{}.attn_v": "encoder.layer.{}.attention.self.value",
    "blk.{}.attn_output": "encoder.layer.{}.attention.output.dense",
    "blk.{}.attn_output_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "blk.{}.ffn_up": "encoder.layer.{}.intermediate.dense",
    "blk.{}.ffn_down": "encoder.layer.{}.output.dense",
    "blk.{}.layer_output_norm": "encoder.layer.{}.output.LayerNorm",
}
_DISTILBERT: Modules = {
    "token_embd": "embeddings.word_embeddings",
    "position_embd": "embeddings.position_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
    "blk.{}.attn_q": "transformer.layer.{}.attention.q_lin",
    "blk.{}.attn_k": "transformer.layer.{}.attention.k_lin",
    "blk.{}.attn_v": "transformer.layer.{}.attention.v_lin",
    "blk.{}.attn_output": "transformer.layer.{}.attention.out_lin",
    "blk.{}.attn_output_norm": "transformer.layer.{}.sa_layer_norm",
    "blk.{}.ffn_up": "transformer.layer.{}.ffn.lin1",
    "blk.{}.ffn_down": "transformer.layer.{}.ffn.lin2",
    "blk.{}.layer_output_norm": "transformer.layer.{}.output_layer_norm",
}
_MODERNBERT: Modules = {
    "token_embd": "embeddings.tok_embeddings",
    "token_embd_norm": "embeddings.norm",
    "output_norm": "final_norm",
    "blk.{}.attn_norm": "layers.{}.attn_norm",
    "blk.{}.attn_qkv": "layers.{}.attn.Wqkv",
    "blk.{}.attn_output": "layers.{}.attn.Wo",
    "blk.{}.ffn_norm": "layers.{}.mlp_norm",
    "blk.{}.ffn_up": "layers.{}.mlp.Wi",
    "blk.{}.ffn_down": "layers.{}.mlp.Wo",
}


def _t5_stack(short: str, name: str, mlp_index: int) -> Modules:
    attention, mlp = f"{name}.block.{{}}.layer.0", f"{name}.block.{{}}.layer.{mlp_index}"
    block = f"{short}.blk.{{}}"
    return {
        f"{short}.output_norm": f"{name}.final_layer_norm",
        f"{block}.attn_norm": f"{attention}.layer_norm",
        **{f"{block}.attn_{part}": f"{attention}.SelfAttention.{part}" for part in "qkvo"},
        f"{block}.attn_rel_b": f"{attention}.SelfAttention.relative_attention_bias",
        f"{block}.ffn_norm": f"{mlp}.layer_norm",
        f"{block}.ffn_down": f"{mlp}.DenseReluDense.wo",
    }


_T5_ATTENTION: Modules = {
    "token_embd": "shared",
    "output": "lm_head",
    **_t5_stack("enc", "encoder", 1),
    **_t5_stack("dec", "decoder", 2),
    "dec.blk.{}.cross_attn_norm": "decoder.block.{}.layer.1.layer_norm",
    **{
        f"dec.blk.{{}}.cross_attn_{part}": f"decoder.block.{{}}.layer.1.EncDecAttention.{part}"
        for part in "qkvo"
    },
}
_T5: Modules = {
    **_T5_ATTENTION,
    "enc.blk.{}.ffn_up": "encoder.block.{}.layer.1.DenseReluDense.wi",
    "dec.blk.{}.ffn_up": "decoder.block.{}.layer.2.DenseReluDense.wi",
}
_T5_GATED: Modules = {
    **_T5_ATTENTION,
    "enc.blk.{}.ffn_gate": "encoder.block.{}.layer.1.DenseReluDense.wi_0",
    "enc.blk.{}.ffn_up": "encoder.block.{}.layer.1.DenseReluDense.wi_1",
    "dec.blk.{}.ffn_gate": "decoder.block.{}.layer.2.DenseReluDense.wi_0",
    "dec.blk.{}.ffn_up": "decoder.block.{}.layer.2.DenseReluDense.wi_1",
}

# By model_type.
_MODULES: Mapping[str, Modules] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": {**_LLAMA, **_MIXTRAL_EXPERTS},
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, **_QK_NORMS},
    "qwen2_moe": {**_LLAMA, **_QWEN_EXPERTS, **_QWEN_SHARED_EXPERT},
    "qwen3_moe": {**_LLAMA, **_QK_NORMS, **_QWEN_EXPERTS},
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": {**_GEMMA2, **_QK_NORMS},
    "phi3": _PHI3,
    "smollm3": _LLAMA,
    "gpt2": _GPT2,
    "gpt_neox": _GPTNEOX,
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "distilbert": _DISTILBERT,
    "modernbert": _MODERNBERT,
    "t5": _T5,
}
# What names begin with, or do not, as a model was saved with a head or without: as above, it is left out of
# encoders' and written out of the others'.
_PREFIXES = {
    "gpt2": "transformer.",
    "bert": "bert.",
    "roberta": "roberta.",
    "xlm-roberta": "roberta.",
    "distilbert": "distilbert.",
    "modernbert": "model.",
}
_KINDS = {"gamma": "weight", "beta": "bias"}  # of norms that TensorFlow made


class Place(NamedTuple):
    """Where a tensor of a model goes: a name in GGUF, and which of the experts in that tensor it is."""

    name: str
    expert: int | None


def modules_of(config: JsonObject) -> Modules:
    """Those of a model that can be read from GGUF or written as it."""
    is_gated = str(config.get("feed_forward_proj", "")).startswith("gated")
    return _T5_GATED if config["model_type"] == "t5" and is_gated else _MODULES[str(config["model_type"])]


def find_place(config: JsonObject, name: str) -> Place | None:
    """Where the tensor of that Hugging Face name is in GGUF; None where it has no place there.

    >>> find_place({"model_type": "llama"}, "model.layers.3.self_attn.q_proj.weight")
    Place(name='blk.3.attn_q.weight', expert=None)
    """
    module, _, kind = name.rpartition(".")
    prefix = _PREFIXES.get(str(config["model_type"]), "")
    there = _names_there(tuple(modules_of(config).items()))
    for own in (module, module.removeprefix(prefix), prefix + module):
        for pattern, indices in _patterns(own):
            if (found := there.get(pattern)) is not None:
                expert = indices[1] if len(indices) > 1 else None
                return Place(f"{found.format(*indices)}.{_KINDS.get(kind, kind)}", expert)
    return None


def find_name(config: JsonObject, name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor, {} in place of the index where it holds all experts; None where
    the model has no such tensor.

    >>> find_name({"model_type": "mixtral"}, "blk.3.ffn_up_exps.weight")
    'model.layers.3.block_sparse_moe.experts.{}.w3.weight'
    """
    match = re.fullmatch(r"(.+)\.(weight|bias)", name)
    if match is None:
        return None
    module, kind = match.groups()
    for pattern, indices in _patterns(module):
        if (found := modules_of(config).get(pattern)) is not None:
            layer = str(indices[0]) if indices else ""
            return f"{found.replace('{}', layer, 1)}.{kind}"
    return None


@lru_cache(maxsize=4)
def _names_there(items: tuple[tuple[str, str], ...]) -> dict[str, str]:
    return {here: there for there, here in items}


def _patterns(module: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A name with none, the first, and the first two of its numbers replaced by {}, and these numbers."""
    yield module, ()
    parts, indices = module.split("."), list[int]()
    for position, part in enumerate(parts):
        if part.isdigit() and len(indices) < 2:
            indices.append(int(part))
            parts[position] = "{}"
            yield ".".join(parts), tuple(indices)
