"""What a folder's files hold, put together to tensors as its `quantization_config` says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from fastserve.checkpoint.awq import read_awq
from fastserve.checkpoint.compressed_tensors import read_compressed_tensors
from fastserve.checkpoint.gptq import read_gptq
from fastserve.checkpoint.packed_weights import QUANT_METHOD, read_packed
from fastserve.checkpoint.safetensors import Part, only_tensors
from fastserve.checkpoint.tensor import StoredTensor
from fastserve.checkpoint.weight_parts import UNQUANTIZED
from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.types import JsonObject

Reader = Callable[[Path, JsonObject, Mapping[str, Part]], dict[str, Part]]
"""Of one method: takes its config and all parts, and gives them with those that it knows put together."""

_READERS: Mapping[str, Reader] = {
    "compressed-tensors": read_compressed_tensors,
    "gptq": read_gptq,
    "awq": read_awq,
    QUANT_METHOD: read_packed,
}


def is_quantized(config: JsonObject) -> bool:
    """Whether a config says how its tensors are quantized."""
    return _quantization(config) is not None


def _quantization(config: JsonObject) -> object:
    """compression_config: as the first versions of compressed-tensors wrote it."""
    return config.get("quantization_config", config.get("compression_config"))


def assemble(folder: Path, config: JsonObject, parts: Mapping[str, Part]) -> Mapping[str, StoredTensor]:
    """The tensors of a folder, quantized ones under the names of the weights that they stand for.

    Raises:
        UnsupportedError: they are quantized in a way that we do not have.
        CheckpointError: parts are missing or contradict each other.
    """
    quantization = _quantization(config)
    if quantization is None:
        return only_tensors(folder, parts)
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{folder}: quantization_config of config.json is no object")
    method = quantization.get(
        "quant_method", "compressed-tensors" if "config_groups" in quantization else None
    )
    if not isinstance(method, str) or method not in _READERS:
        raise UnsupportedError(
            f"{folder} is quantized with quant_method {method!r:.80}, supported are {', '.join(_READERS)}",
            hint=UNQUANTIZED,
        )
    return only_tensors(folder, _READERS[method](folder, quantization, parts))
