"""Reads marlin-24, an older form of compressed-tensors for weights of which two of four neighbours are zero:
the others as whole numbers in the order in which Marlin's kernel loads them, their places in that of CUTLASS.

Layouts: github.com/vllm-project/compressed-tensors (0.11), utils/permutations_24.py and
utils/semi_structured_conversions.py, compressors/sparse_quantized_compressors/marlin_24.py. Symmetric; groups
of 128 columns, or whole rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.grouped_tensor import GroupedTensor, Groups, to_signed, unpack_bits
from fastserve.checkpoint.weight_parts import WeightParts, float_columns

_TILE = 16  # inputs, and outputs, of a tile
_STRIP = 64  # outputs whose tiles are permuted together
_GROUP_SIZE = 128
_INTERLEAVED = {4: [0, 2, 4, 6, 1, 3, 5, 7], 8: [0, 2, 1, 3]}
# Outputs of a strip, in the order in which scales of groups lie.
_SCALES = np.arange(_STRIP).reshape(8, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(-1)


def read_marlin_24(parts: WeightParts) -> GroupedTensor:
    """`weight_packed` [kept inputs / 16, outputs * bits / 2], `scale_packed` [groups, outputs], and `meta`:
    two bits for the place of each kept number.

    Raises:
        CheckpointError: their shapes contradict each other.
    """
    packed, meta = parts.integers("weight_packed", "I32"), parts.integers("meta", "I16")
    scales = parts.floats("scale_packed")
    if packed.ndim != 2 or len(scales.shape) != 2 or not packed.size or not meta.size:
        raise parts.contradict_shapes(packed, meta, scales)
    num_groups, rows = scales.shape
    bits = packed.shape[1] * 32 // (rows * _TILE) if rows else 0
    kept = packed.shape[0] * _TILE
    fits = bits in _INTERLEAVED and packed.shape[1] * 32 == rows * _TILE * bits
    has_groups = num_groups in (1, 2 * kept / _GROUP_SIZE)
    if not fits or rows % _STRIP or meta.size * 8 != rows * kept or not has_groups:
        raise parts.contradict_shapes(packed, meta, scales)
    depth = 2 * kept
    flat = meta.reshape(-1)
    # As the writer decides, which counts the kept inputs alone.
    order = np.argsort(_SCALES) if num_groups > 1 and kept > _GROUP_SIZE else np.arange(_STRIP)

    def read(begin: int, end: int) -> Groups:
        first, last = begin // _STRIP * _STRIP, -(-end // _STRIP) * _STRIP
        words = slice(first * _TILE * bits // 32, last * _TILE * bits // 32)
        values = _untile(unpack_bits(packed[:, words], bits, (last - first) * _TILE), bits)
        dense = _spread(to_signed(values, bits), _places(flat, rows, kept // 8, first, last))
        stored = float_columns(scales, first, last).reshape(num_groups, -1, _STRIP)
        in_order = stored[:, :, order].reshape(num_groups, -1)
        chosen = slice(begin - first, end - first)
        return Groups(dense[chosen], None, in_order[:, chosen].T)

    return GroupedTensor(
        f"{parts.module}.weight",
        scales.format,
        (rows, depth),
        read,
        lambda: None,
        bits=bits,
        group_size=parts.group_size(depth, num_groups),
    )


def _untile(numbers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Numbers [tiles of inputs, outputs * 16], each strip permuted, as [outputs, kept inputs]."""
    in_order = np.empty_like(numbers).reshape(-1, _TILE * _STRIP)
    in_order[:, _permutation(bits)] = numbers.reshape(in_order.shape)
    tiles = in_order.reshape(len(numbers), -1, _TILE, _TILE)  # [of inputs, of outputs, inputs, outputs]
    return tiles.transpose(1, 3, 0, 2).reshape(-1, len(numbers) * _TILE)


def _permutation(bits: int) -> NDArray[np.int64]:
    """Places within four tiles [4, 16, 16] of the numbers that 32 threads of the kernel load, one by one."""
    thread = np.arange(32)[:, None, None, None]
    part = np.arange(4)[None, :, None, None]
    block = np.arange(2)[None, None, :, None]
    row = np.array([0, 1, 8, 9])[None, None, None, :] + 2 * (thread % 4)
    column = thread // 4
    places = 16 * row + column // 2 * 256 + 8 * (column % 2) + 4 * block + part
    return places.reshape(-1, len(_INTERLEAVED[bits]))[:, _INTERLEAVED[bits]].reshape(-1)


def _places(meta: NDArray[np.int16], rows: int, num_words: int, begin: int, end: int) -> NDArray[np.uint8]:
    """Where kept numbers of rows belong within their four neighbours [rows, kept]; words have eight each.

    CUTLASS swizzles rows of 64 and pairs of words (its ColumnMajorInterleaved layout of two).
    """
    row = np.arange(begin, end)[:, None]
    word = np.arange(num_words)[None, :]
    swizzled = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 4 // 2 * 32 + row % 64 // 8 * 4
    shift = ((swizzled % 2 == 0) & (word % 2 == 1)).astype(np.int64)
    shift -= ((swizzled % 2 == 1) & (word % 2 == 0)).astype(np.int64)
    swizzled, word = swizzled + shift, word - shift
    words = meta[word // 2 * rows * 2 + swizzled * 2 + word % 2].view(np.uint16)
    places = words[:, :, None] >> np.arange(0, 16, 2, dtype=np.uint16) & np.uint16(3)
    of_rows: NDArray[np.uint8] = places.reshape(end - begin, -1).astype(np.uint8)
    return of_rows


def _spread(kept: NDArray[np.int8], places: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Kept numbers [rows, kept] at their places among zeros [rows, 2 * kept]."""
    dense = np.zeros((len(kept), 2 * kept.shape[1]), np.int8)
    columns = np.arange(kept.shape[1]) // 2 * 4 + places
    np.put_along_axis(dense, columns, kept, axis=1)
    return dense
