"""The tensors of a GGUF file under their Hugging Face names, arranged as they are there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

from fastserve.checkpoint.gguf import GgufFile
from fastserve.checkpoint.gguf_config import ROPE_TENSORS
from fastserve.checkpoint.tensor import StoredTensor
from fastserve.checkpoint.view import Change, rows_regrouped, shifted, transposed_back
from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.types import JsonObject

# GGUF module name → Hugging Face module name, {} being the layer index
# (gguf-py/gguf/tensor_mapping.py of ggml-org/llama.cpp).
_LLAMA_MODULES = {
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
_QK_NORMS = {
    "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
}
# One tensor holds all experts; the second {} is the expert's index.
_MIXTRAL_EXPERTS = {
    "blk.{}.ffn_gate_inp": "model.layers.{}.block_sparse_moe.gate",
    "blk.{}.ffn_gate_exps": "model.layers.{}.block_sparse_moe.experts.{}.w1",
    "blk.{}.ffn_up_exps": "model.layers.{}.block_sparse_moe.experts.{}.w3",
    "blk.{}.ffn_down_exps": "model.layers.{}.block_sparse_moe.experts.{}.w2",
}
_QWEN_EXPERTS = {
    "blk.{}.ffn_gate_inp": "model.layers.{}.mlp.gate",
    "blk.{}.ffn_gate_exps": "model.layers.{}.mlp.experts.{}.gate_proj",
    "blk.{}.ffn_up_exps": "model.layers.{}.mlp.experts.{}.up_proj",
    "blk.{}.ffn_down_exps": "model.layers.{}.mlp.experts.{}.down_proj",
}
_QWEN_SHARED_EXPERT = {
    "blk.{}.ffn_gate_inp_shexp": "model.layers.{}.mlp.shared_expert_gate",
    "blk.{}.ffn_gate_shexp": "model.layers.{}.mlp.shared_expert.gate_proj",
    "blk.{}.ffn_up_shexp": "model.layers.{}.mlp.shared_expert.up_proj",
    "blk.{}.ffn_down_shexp": "model.layers.{}.mlp.shared_expert.down_proj",
}
_GEMMA2_MODULES = _LLAMA_MODULES | {
    "blk.{}.post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    "blk.{}.post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}
_PHI3_MODULES = _LLAMA_MODULES | {
    "blk.{}.attn_qkv": "model.layers.{}.self_attn.qkv_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.gate_up_proj",
}
_GPT2_MODULES = {
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
_GPTNEOX_MODULES = {
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
_BERT_MODULES = {
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
# By general.architecture.
MODULES: Mapping[str, Mapping[str, str]] = {
    "llama": _LLAMA_MODULES | _MIXTRAL_EXPERTS,
    "bert": _BERT_MODULES,
    "qwen2": _LLAMA_MODULES,
    "qwen3": _LLAMA_MODULES | _QK_NORMS,
    "qwen2moe": _LLAMA_MODULES | _QWEN_EXPERTS | _QWEN_SHARED_EXPERT,
    "qwen3moe": _LLAMA_MODULES | _QK_NORMS | _QWEN_EXPERTS,
    "gemma": _LLAMA_MODULES,
    "gemma2": _GEMMA2_MODULES,
    "gemma3": _GEMMA2_MODULES | _QK_NORMS,
    "phi3": _PHI3_MODULES,
    "smollm3": _LLAMA_MODULES,
    "gpt2": _GPT2_MODULES,
    "gptneox": _GPTNEOX_MODULES,
}


class HfTensors(Mapping[str, StoredTensor]):
    """The tensors of a GGUF file under their Hugging Face names.

    Conversion to GGUF moves some of them about (see `_ARRANGED`); they come back as they were. All others are
    views of the mapped file.
    """

    def __init__(self, file: GgufFile, config: JsonObject) -> None:
        self._tensors: dict[str, StoredTensor] = {}
        for name, tensor in file.tensors.items():
            if name not in ROPE_TENSORS:
                self._tensors |= _renamed(hf_name(file, name), tensor)
        find_change = _ARRANGED.get(file.architecture, _keep)
        self._changed: dict[str, StoredTensor] = {}
        for name, tensor in self._tensors.items():
            change = find_change(name, config)
            if change is None:
                continue
            try:
                self._changed[name] = change(tensor)
            except CheckpointError as error:
                raise CheckpointError(f"{file.path}: {error.message}") from error

    def __getitem__(self, name: str) -> StoredTensor:
        changed = self._changed.get(name)
        return self._tensors[name] if changed is None else changed

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _renamed(name: str, tensor: StoredTensor) -> dict[str, StoredTensor]:
    """A tensor under its Hugging Face name, or the matrices of all experts that it holds under theirs."""
    if "{}" in name:
        count, *shape = tensor.shape
        size = tensor.format.num_bytes(tuple(shape))
        return {
            (own := name.format(index)): StoredTensor(
                own, tensor.format, tuple(shape), tensor.data[index * size : (index + 1) * size]
            )
            for index in range(count)
        }
    if name.endswith("shared_expert_gate.weight") and len(tensor.shape) == 1:
        return {name: StoredTensor(name, tensor.format, (1, *tensor.shape), tensor.data)}
    return {name: replace(tensor, name=name)}


def hf_name(file: GgufFile, name: str) -> str:
    """The Hugging Face name of a GGUF tensor; with {} in place of the index where it holds all experts.

    Raises:
        UnsupportedError: the architecture has no such tensor in the variations that we have.
    """
    match = re.fullmatch(r"(blk\.)?(\d+)?(.*)\.(weight|bias)", name)
    if match:
        prefix, layer, rest, kind = match.groups()
        gguf_module = f"{prefix or ''}{'' if layer is None else '{}'}{rest}"
        module = MODULES[file.architecture].get(gguf_module)
        if module is not None:
            return f"{module.replace('{}', layer or '', 1)}.{kind}"
    raise UnsupportedError(
        f"{file.path}: tensor {name!r} is unknown for architecture {file.architecture!r}",
        hint="variations for images and sound are not supported",
    )


def _keep(name: str, config: JsonObject) -> Change | None:
    return None


def _in_halves(name: str, config: JsonObject) -> Change | None:
    """Rows of Llama's q and k are (head, pair, element of the pair), for a rotary embedding of neighbours;
    they were (head, element of the pair, pair)."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    count = heads.get(name.split(".")[-2])
    return None if count is None else partial(_halves_of_heads, count=count)


def _halves_of_heads(tensor: StoredTensor, count: int) -> StoredTensor:
    rows = tensor.shape[0]
    if rows % (2 * count):
        raise CheckpointError(f"{tensor.name} has {rows} rows, a multiple of {2 * count} was expected")
    return rows_regrouped(tensor, (count, rows // count // 2, 2), (0, 2, 1))


def _less_one(name: str, config: JsonObject) -> Change | None:
    """Weights of Gemma's norms are stored as they are multiplied with; they were less 1. What the graph adds
    up again is what is stored: exactly for 0.5 and more, within half a float32 step of 1 for less."""
    return partial(shifted, offset=-1.0) if name.endswith("norm.weight") else None


def _by_inputs(name: str, config: JsonObject) -> Change | None:
    """Matrices of GPT-2 are [out, in]; they were [in, out]."""
    return transposed_back if re.search(r"\.c_(attn|proj|fc)\.weight$", name) else None


def _by_heads(name: str, config: JsonObject) -> Change | None:
    """Rows of GPT-NeoX's fused matrix are (q/k/v, head, dimension); they were (head, q/k/v, dimension)."""
    if not re.search(r"\.query_key_value\.(weight|bias)$", name):
        return None
    heads = config["num_attention_heads"]
    return partial(rows_regrouped, shape=(3, heads, config["hidden_size"] // heads), axes=(1, 0, 2))


# What conversion moves about, and how to undo it, by general.architecture.
_ARRANGED: Mapping[str, Callable[[str, JsonObject], Change | None]] = {
    "llama": _in_halves,
    "smollm3": _in_halves,
    "gemma": _less_one,
    "gemma2": _less_one,
    "gemma3": _less_one,
    "gpt2": _by_inputs,
    "gptneox": _by_heads,
}
