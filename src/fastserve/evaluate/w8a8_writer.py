"""Writes a Llama with int8 weights and activations in the compressed-tensors schema, for vLLM to open.

Weights have a scale for each output channel, activations one for each token, as they come. Schema:
github.com/neuralmagic/compressed-tensors, quant_config.py and quant_scheme.py (W8A8).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.convert import from_bf16, to_bf16, to_f32
from fastserve.checkpoint.tensor import StoredTensor
from fastserve.errors import UnsupportedError
from fastserve.evaluate.model_folder import write_model_folder
from fastserve.models.family import read_config
from fastserve.models.llama import LlamaConfig
from fastserve.types import Float32Array, JsonObject

_LINEAR_ENDING = "_proj.weight"
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTIZATION: JsonObject = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**_INT8, "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head"],
}


def write_w8a8(checkpoint: Checkpoint, tokenizer: str, folder: Path) -> None:
    """Write the model with int8 linears; head, embedding and norms stay bfloat16.

    Raises:
        UnsupportedError: the model is no Llama.
    """
    model = read_config(checkpoint.config)
    if not isinstance(model, LlamaConfig) or model.model_type != "llama":
        raise UnsupportedError("only Llama models can be written as W8A8", hint="compare others")
    integers = {name for name in checkpoint.tensors if name.endswith(_LINEAR_ENDING)}
    shapes = {name: checkpoint.tensors[name].shape for name in checkpoint.tensors}
    shapes |= {_scale_name(name): (shapes[name][0], 1) for name in integers}

    def blocks(name: str) -> Iterator[Float32Array]:
        if name not in checkpoint.tensors:
            yield quantize_channels(checkpoint.tensors[name.removesuffix("_scale")])[1]
        elif name in integers:
            yield quantize_channels(checkpoint.tensors[name])[0]
        else:
            yield to_f32(checkpoint.tensors[name])

    config = {
        "architectures": ["LlamaForCausalLM"],
        **checkpoint.config,
        "torch_dtype": "bfloat16",
        "quantization_config": QUANTIZATION,
    }
    write_model_folder(folder, config, tokenizer, shapes, blocks, integers)


def quantize_channels(tensor: StoredTensor) -> tuple[Float32Array, Float32Array]:
    """Whole numbers from -127 to 127 [outputs, inputs], and the bfloat16 scale of each row [outputs, 1]."""
    values = to_f32(tensor)
    largest = np.abs(values).max(axis=1, keepdims=True)
    scales = from_bf16(to_bf16(largest / np.float32(127)))
    return np.clip(np.rint(values / np.where(scales > 0, scales, np.float32(1))), -127, 127), scales


def _scale_name(name: str) -> str:
    return name + "_scale"
