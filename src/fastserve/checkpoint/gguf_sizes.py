"""Reads the sizes of a model, and single values, from the metadata of a GGUF file."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastserve.checkpoint.gguf import GgufFile, GgufMetadata
from fastserve.errors import CheckpointError, UnsupportedError

_MAX_LAYERS = 10_000


def read_sizes(file: GgufFile) -> dict[str, Any]:
    """What every architecture has: sizes, and tokens with a role, as keys of config.json.

    Raises:
        CheckpointError: one is missing, or impossible.
    """
    metadata, architecture = file.metadata, file.architecture
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(
            f"{file.path} has no token_embd.weight matrix", hint="a vocabulary alone is no model"
        )
    config = {
        "vocab_size": embedding.shape[0],
        "hidden_size": read_count(metadata, f"{architecture}.embedding_length"),
        "intermediate_size": read_count(metadata, f"{architecture}.feed_forward_length"),
        "num_hidden_layers": read_count(metadata, f"{architecture}.block_count"),
        "num_attention_heads": read_count(metadata, f"{architecture}.attention.head_count"),
        "max_position_embeddings": read_count(metadata, f"{architecture}.context_length"),
    }
    if config["hidden_size"] != embedding.shape[1]:
        raise CheckpointError(
            f"{file.path}: embedding_length is {config['hidden_size']},"
            f" token_embd.weight has {embedding.shape[1]} columns"
        )
    if config["num_hidden_layers"] > _MAX_LAYERS:
        raise CheckpointError(
            f"{file.path} claims {config['num_hidden_layers']} layers, the limit is {_MAX_LAYERS}"
        )
    return config | read_token_ids(metadata)


def read_token_ids(metadata: GgufMetadata) -> dict[str, int | None]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {
        f"{name}_token_id": metadata.integer(f"tokenizer.ggml.{there}_token_id")
        for name, there in names.items()
    }


def read_count(metadata: GgufMetadata, key: str) -> int:
    if isinstance(metadata.get(key), np.ndarray):
        raise UnsupportedError(f"{metadata.path}: {key} differs between layers")
    value = metadata.integer(key)
    if value is None or value < 1:
        raise CheckpointError(f"{metadata.path}: {key} is {value}, a positive integer was expected")
    return value


def read_positive(metadata: GgufMetadata, key: str) -> float:
    value = metadata.number(key)
    if value is None or not 0 < value < float("inf"):
        raise CheckpointError(f"{metadata.path}: {key} is {value}, a positive number was expected")
    return value
