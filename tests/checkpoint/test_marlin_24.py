"""Weights packed here number by number: digests tell that compressed-tensors 0.11 packs the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from fastserve.checkpoint import StoredTensor
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.errors import CheckpointError

OpenParts = Callable[..., Mapping[str, StoredTensor]]

CONFIG = {"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {}}
# Of weight_packed, scale_packed and meta as Marlin24Compressor of compressed-tensors 0.11.0 makes them.
DIGESTS = {
    (4, 128, 512, 128): "13ec668e1fb149ff7dd68227671c7937",
    (8, 64, 128, 0): "663d4287a3d8db55b0d74da2a45d5c3a",
    (4, 192, 256, 128): "540222d3f7786b39576a02ac189cebde",
}


def random_weight(bits: int, rows: int, depth: int, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes, two of four neighbours not zero [rows, depth], and float16 scales [rows, groups]."""
    rng = np.random.default_rng(24)
    limit = 2 ** (bits - 1)
    codes = rng.integers(-limit, limit - 1, (rows, depth // 4, 4))
    codes[codes >= 0] += 1
    kept = rng.random(codes.shape).argsort(axis=2) < 2
    scales = (rng.random((rows, depth // group_size if group_size else 1)) * 0.1 + 0.01).astype(np.float16)
    return (codes * kept).reshape(rows, depth), scales


def pack(codes: np.ndarray, scales: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    rows, depth = codes.shape
    quads = codes.reshape(rows, -1, 4)
    places = np.nonzero(quads)[2].reshape(rows, -1, 2)
    kept = np.take_along_axis(quads, places, axis=2).reshape(rows, -1) + 2 ** (bits - 1)
    return {
        "weight_packed": pack_words(kept, bits),
        "scale_packed": pack_scales(scales, depth),
        "meta": pack_places(places),
    }


def pack_words(kept: np.ndarray, bits: int) -> np.ndarray:
    order = {4: [0, 2, 4, 6, 1, 3, 5, 7], 8: [0, 2, 1, 3]}[bits]
    rows, depth = kept.shape
    lines = []
    for begin in range(0, depth, 16):
        line: list[int] = []
        for strip in range(0, rows, 64):
            numbers: list[int] = []
            for thread in range(32):
                column, first = thread // 4, 2 * (thread % 4)
                for part in range(4):
                    for block in (0, 1):
                        output = column // 2 * 16 + column % 2 * 8 + block * 4 + part
                        inputs = (first, first + 1, first + 8, first + 9)
                        numbers += [int(kept[strip + output, begin + i]) for i in inputs]
            for at in range(0, len(numbers), len(order)):
                line += [numbers[at + place] for place in order]
        lines.append(line)
    per_word = 32 // bits
    grouped = np.asarray(lines, np.uint64).reshape(len(lines), -1, per_word)
    words = (grouped << np.arange(0, 32, bits, dtype=np.uint64)).sum(axis=2)
    return words.astype(np.uint32).view(np.int32)


def pack_scales(scales: np.ndarray, depth: int) -> np.ndarray:
    packed = np.ascontiguousarray(scales.T)
    if scales.shape[1] > 1 and depth // 2 > 128:
        for line in packed:
            for begin in range(0, len(line), 8):
                line[begin : begin + 8] = line[begin : begin + 8][[0, 4, 1, 5, 2, 6, 3, 7]]
    return packed


def pack_places(places: np.ndarray) -> np.ndarray:
    rows = len(places)
    quads = (places[:, :, 0] | places[:, :, 1] << 2).reshape(rows, -1, 4)
    words = (quads << np.arange(0, 16, 4)).sum(axis=2)  # [rows, words]
    flat = np.empty(words.size, np.uint16)
    for row in range(rows):
        for word in range(words.shape[1]):
            r = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 4 // 2 * 32 + row % 64 // 8 * 4
            w = word
            if r % 2 == 0 and w % 2 == 1:
                r, w = r + 1, w - 1
            elif r % 2 == 1 and w % 2 == 0:
                r, w = r - 1, w + 1
            flat[w // 2 * rows * 2 + r * 2 + w % 2] = words[row, word]
    return flat.view(np.int16).reshape(words.shape[1] // 2, rows * 2)


@pytest.mark.parametrize(("bits", "rows", "depth", "group_size"), DIGESTS)
def test_weights_are_those_that_were_packed(
    open_parts: OpenParts, bits: int, rows: int, depth: int, group_size: int
) -> None:
    codes, scales = random_weight(bits, rows, depth, group_size)
    parts = pack(codes, scales, bits)
    digest = hashlib.sha256(b"".join(part.tobytes() for part in parts.values())).hexdigest()
    assert digest[:32] == DIGESTS[bits, rows, depth, group_size]
    tensors = open_parts({f"a.{name}": torch.from_numpy(part) for name, part in parts.items()}, CONFIG)
    assert list(tensors) == ["a.weight"]
    weight = tensors["a.weight"]
    assert isinstance(weight, GroupedTensor)
    assert (weight.bits, weight.shape) == (bits, (rows, depth))
    repeated = np.repeat(scales, depth // scales.shape[1], axis=1)
    expected = (codes.astype(np.float16) * repeated).astype(np.float32)
    assert np.array_equal(to_f32(weight), expected)
    assert np.array_equal(to_f32(weight.rows(5, 41)), expected[5:41])


@pytest.mark.parametrize(
    "changes",
    [
        {"meta": torch.zeros((4, 127), dtype=torch.int16)},
        {"weight_packed": torch.zeros((4, 65), dtype=torch.int32)},
        {"scale_packed": torch.ones((3, 64), dtype=torch.float16)},
        {"scale_packed": torch.ones((2, 32), dtype=torch.float16)},
        {"scale_packed": torch.ones(0, dtype=torch.float16)},
    ],
)
def test_parts_that_contradict_each_other_are_named(open_parts: OpenParts, changes: dict[str, Any]) -> None:
    codes, scales = random_weight(4, 64, 128, 0)
    parts: dict[str, Any] = {name: torch.from_numpy(part) for name, part in pack(codes, scales, 4).items()}
    named = {f"a.{name}": part for name, part in {**parts, **changes}.items()}
    with pytest.raises(CheckpointError, match="of a, "):
        to_f32(open_parts(named, CONFIG)["a.weight"])
