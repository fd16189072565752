"""Writes whole numbers with scales as compressed-tensors has them, and the config that says so.

Schema: github.com/vllm-project/compressed-tensors (0.20), quantization/quant_config.py; layouts of
compressors/{naive_quantized,pack_quantized}. Weights of int-quantized meet activations of int8 that have a
scale for each token, as they come.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.convert import to_float_format
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.checkpoint.rounding import pack_bits, row_pieces
from fastserve.checkpoint.safetensors_writer import WrittenTensor
from fastserve.checkpoint.tensor import TensorFormat
from fastserve.types import JsonObject

WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class _Arguments:
    """What modules of one group have in common."""

    is_packed: bool
    bits: int
    group_size: int | None  # None: a scale for a whole row

    @property
    def form(self) -> str:
        return "pack-quantized" if self.is_packed else "int-quantized"

    def to_json(self) -> JsonObject:
        weights: dict[str, Any] = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel" if self.group_size is None else "group",
            "dynamic": False,
        }
        if self.group_size is not None:
            weights["group_size"] = self.group_size
        if self.is_packed:
            return {"weights": weights}
        activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        return {"weights": weights, "input_activations": activations}


class CompressedWeights:
    """The quantized weights of a model: what is written for each, and the config for all.

    Args:
        weights: by name, which ends in `.weight`; columns of a group are neighbours, and there are no zero
            points (transformers 5.23 does not load packed ones).
        with_int8_activations: names of those that are written as int-quantized: int8 of whole rows, without
            zero points. The others are packed, and meet activations as they are.
        scale_format: of scales.
    """

    def __init__(
        self,
        weights: Mapping[str, GroupedTensor],
        with_int8_activations: Collection[str],
        scale_format: TensorFormat,
    ) -> None:
        self._weights = weights
        self._scale_format = scale_format
        self._arguments = {
            name: _describe(weight, is_packed=name not in with_int8_activations)
            for name, weight in weights.items()
        }

    def parts(self, name: str) -> list[WrittenTensor]:
        """The tensors that a weight is written as."""
        weight, arguments = self._weights[name], self._arguments[name]
        rows, depth = weight.shape
        module = name.removesuffix(WEIGHT)
        num_groups = 1 if arguments.group_size is None else -(-depth // weight.group_size)
        scales = WrittenTensor(
            f"{module}.weight_scale",
            self._scale_format.name,
            (rows, num_groups),
            lambda: self._scales(weight),
        )
        if not arguments.is_packed:
            return [WrittenTensor(name, "I8", weight.shape, lambda: _codes(weight)), scales]
        bits = arguments.bits
        shape = np.asarray([rows, depth], np.int64)
        return [
            WrittenTensor(
                f"{module}.weight_packed",
                "I32",
                (rows, -(-depth * bits // 32)),
                lambda: (pack_bits(_from_zero(codes, bits), bits) for codes in _codes(weight)),
            ),
            scales,
            WrittenTensor(f"{module}.weight_shape", "I64", (2,), lambda: [shape]),
        ]

    def config(self, ignored: Iterable[str]) -> JsonObject:
        """The `quantization_config`. `ignored` are modules that stay as they are."""
        by_arguments: dict[_Arguments, list[str]] = {}
        for name, arguments in self._arguments.items():
            by_arguments.setdefault(arguments, []).append(name.removesuffix(WEIGHT))
        forms = {arguments.form for arguments in by_arguments}
        groups = {}
        for index, (arguments, modules) in enumerate(by_arguments.items()):
            targets = ["Linear"] if len(by_arguments) == 1 else modules
            group = {"targets": targets, **arguments.to_json()}
            groups[f"group_{index}"] = group if len(forms) == 1 else {**group, "format": arguments.form}
        return {
            "quant_method": "compressed-tensors",
            "format": forms.pop() if len(forms) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted(ignored),
        }

    def _scales(self, weight: GroupedTensor) -> Iterable[NDArray[np.uint8]]:
        for begin, end in row_pieces(weight.shape):
            yield to_float_format(weight.groups(begin, end).scales, self._scale_format)


def _describe(weight: GroupedTensor, *, is_packed: bool) -> _Arguments:
    return _Arguments(
        is_packed=is_packed,
        bits=4 if weight.bits <= 4 else 8,
        group_size=None if weight.group_size >= weight.shape[1] else weight.group_size,
    )


def _codes(weight: GroupedTensor) -> Iterable[NDArray[np.int8]]:
    for begin, end in row_pieces(weight.shape):
        yield weight.groups(begin, end).codes


def _from_zero(numbers: NDArray[np.int8], bits: int) -> NDArray[Any]:
    return numbers.view(np.uint8) + np.uint8(2 ** (bits - 1))
