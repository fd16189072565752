"""Models with random weights in the shapes of real ones: as fast or slow as those, at no download."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.gguf_tokenizer import build_from_gguf
from fastserve.errors import OptionError
from fastserve.evaluate.model_folder import write_model_folder
from fastserve.graph.node import Graph
from fastserve.hub.registry import Registry
from fastserve.models.family import build_graph, read_config
from fastserve.models.parameters import expected_parameters
from fastserve.option import check_choice
from fastserve.types import Float32Array, JsonObject

SMOLLM2 = "smollm2-135m-instruct"
SMOLLM2_VOCAB_SIZE = 49152

_BLOCK_ELEMENTS = 2**22


def _llama(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: object
) -> JsonObject:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": SMOLLM2_VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        **more,
    }


def _bert(hidden: int, intermediate: int, layers: int) -> JsonObject:
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": 30522,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 12,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "torch_dtype": "bfloat16",
    }


SHAPES: Mapping[str, JsonObject] = {
    # With SmolLM2's vocabulary, a third of its own.
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8),
    # As a Llama with biases, which then has one on the output projection too, where Qwen2.5 has none.
    "qwen2.5-0.5b": _llama(896, 4864, 24, 14, 2, vocab_size=151936, attention_bias=True),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3),
    "bert-base": _bert(768, 3072, 12),
    "minilm": _bert(384, 1536, 6),
}


def make_model(shape: str, folder: Path, *, sparsity: float = 0.0) -> int:
    """Write a model of that shape, the same every time, and return its number of parameters.

    `sparsity` is the share of zeros in every matrix, tied embeddings too: the weights of least magnitude, as
    pruning by magnitude leaves them, far enough from what rounding would make zeros.

    The tokenizer is SmolLM2's where that model is in the local store and the vocabulary is its own, else one
    that gives every byte a token.

    Raises:
        OptionError: there is no such shape, the folder holds something, or sparsity is not from 0 to 1.
    """
    config = shape_config(shape)
    if not 0 <= sparsity < 1:
        raise OptionError(f"sparsity={sparsity} is no share below 1", hint="choose one such as 0.5")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OptionError(f"{folder} is not an empty folder", hint="name one that is not there yet")
    return write_random_model(config, folder, sparsity=sparsity)


def write_random_model(config: JsonObject, folder: Path, *, sparsity: float = 0.0) -> int:
    """Write a model of this config with random weights; returns its number of parameters."""
    shapes = expected_parameters(build_graph(read_config(config)))
    tokenizer = _find_tokenizer(config["vocab_size"])
    write_model_folder(
        folder, config, tokenizer, shapes, lambda name: _random_blocks(name, shapes[name], sparsity)
    )
    return sum(map(math.prod, shapes.values()))


def shape_config(shape: str) -> JsonObject:
    """The config of a shape.

    Raises:
        OptionError: there is no such shape.
    """
    check_choice("like", shape, tuple(SHAPES))
    return SHAPES[shape]


def shape_graph(shape: str) -> Graph:
    """The graph of a shape, before any pass. Raises as `shape_config`."""
    return build_graph(read_config(shape_config(shape)))


def _random_blocks(name: str, shape: tuple[int, ...], sparsity: float) -> Iterator[Float32Array]:
    """Values that keep their size from layer to layer: scales of norms near 1, matrices by their width."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    is_scale = len(shape) == 1 and name.endswith("weight")
    deviation = np.float32(0.02 if len(shape) == 1 else shape[1] ** -0.5)
    left = math.prod(shape)
    while left:
        values = rng.standard_normal(min(left, _BLOCK_ELEMENTS), dtype=np.float32) * deviation
        if sparsity and len(shape) == 2:
            magnitudes = np.abs(values)
            values[magnitudes < np.quantile(magnitudes, sparsity)] = 0
        yield values + np.float32(1) if is_scale else values
        left -= len(values)


def _find_tokenizer(vocab_size: int) -> str:
    """The text of a tokenizer.json with that many tokens."""
    record = Registry.of_user().find(SMOLLM2) if vocab_size == SMOLLM2_VOCAB_SIZE else None
    if record is None or record.damaged_files():
        return json.dumps(make_byte_tokenizer(vocab_size))
    metadata = open_checkpoint(record.path).metadata
    if metadata is None:
        return (record.path / "tokenizer.json").read_text(encoding="utf-8")
    return str(build_from_gguf(metadata)[0].to_str())


def make_byte_tokenizer(vocab_size: int) -> JsonObject:
    """A tokenizer.json that gives every byte of a text a token; the other tokens are fillers.

    The first tokens are special. Bytes are written as GPT-2 does (its encoder.py, bytes_to_unicode).
    """
    specials = ("<unk>", "<s>", "</s>")
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    names = [*specials, *characters]
    names += [f"<filler {index}>" for index in range(len(names), vocab_size)]
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": index,
                "content": name,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for index, name in enumerate(specials)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "vocab": {name: index for index, name in enumerate(names[:vocab_size])},
            "merges": [],
        },
    }
