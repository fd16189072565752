from __future__ import annotations

import numpy as np
import pytest

from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.grouped_tensor import GroupedTensor, Groups
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.checkpoint.view import Arranged, rows_regrouped, shifted, transposed, transposed_back
from fastserve.errors import CheckpointError, UnsupportedError

VALUES = np.arange(6 * 4, dtype=np.float32).reshape(6, 4)


def f32(values: np.ndarray) -> StoredTensor:
    return StoredTensor(
        "w", TensorFormat.F32, values.shape, np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    )


def grouped(values: np.ndarray, zeros: np.ndarray | None = None) -> GroupedTensor:
    """Whole numbers in groups of two columns, with scales that differ from row to row."""
    codes = values.astype(np.int8)
    rows, depth = codes.shape
    scales = np.arange(1, 1 + rows * depth // 2, dtype=np.float32).reshape(rows, depth // 2)

    def read(begin: int, end: int) -> Groups:
        part = None if zeros is None else zeros[begin:end]
        return Groups(codes[begin:end], part, scales[begin:end])

    return GroupedTensor("w", TensorFormat.F32, (rows, depth), read, lambda: zeros, bits=8, group_size=2)


@pytest.mark.parametrize("stored_format", [TensorFormat.F32, TensorFormat.BF16])
def test_a_transposed_matrix_is_read_whole_or_in_rows(stored_format: TensorFormat) -> None:
    halves = (VALUES.view(np.uint32) >> 16).astype(np.uint16)
    data = VALUES if stored_format is TensorFormat.F32 else halves
    tensor = transposed(StoredTensor("w", stored_format, (6, 4), data.reshape(-1).view(np.uint8)))
    assert (tensor.name, tensor.format, tensor.shape) == ("w", stored_format, (4, 6))
    np.testing.assert_array_equal(to_f32(tensor), VALUES.T)
    np.testing.assert_array_equal(to_f32(tensor.rows(1, 3)), VALUES.T[1:3])


def test_transposing_twice_gives_the_tensor_itself() -> None:
    tensor = f32(VALUES)
    assert transposed(transposed(tensor)) is tensor
    assert transposed(transposed_back(tensor)) is tensor
    vector = f32(VALUES[0])
    assert transposed_back(vector) is vector


def test_blocks_are_turned_back_but_not_turned() -> None:
    blocks = StoredTensor("w", TensorFormat.Q8_0, (2, 32), np.zeros(68, np.uint8))
    with pytest.raises(UnsupportedError, match="w is stored as q8_0 and transposed"):
        transposed(blocks)
    seen = transposed_back(blocks)
    assert seen.shape == (32, 2)
    assert transposed(seen) is blocks
    with pytest.raises(UnsupportedError, match="w is stored as q8_0 and transposed"):
        _ = seen.data


def test_what_is_no_matrix_is_not_transposed() -> None:
    with pytest.raises(CheckpointError, match=r"w has shape \[4\], a matrix was expected"):
        transposed(f32(VALUES[0]))


def test_rows_come_in_the_order_of_their_indices() -> None:
    order = [0, 2, 4, 1, 3, 5]  # (3, 2) with the last index first
    tensor = rows_regrouped(f32(VALUES), (3, 2), (1, 0))
    np.testing.assert_array_equal(to_f32(tensor), VALUES[order])
    np.testing.assert_array_equal(to_f32(tensor.rows(2, 5)), VALUES[order][2:5])
    vector = rows_regrouped(f32(VALUES[:, 0]), (3, 2), (1, 0))
    np.testing.assert_array_equal(to_f32(vector), VALUES[order, 0])


@pytest.mark.parametrize("has_zeros", [False, True])
def test_whole_numbers_move_with_their_scales(has_zeros: bool) -> None:
    zeros = np.arange(12, dtype=np.int8).reshape(6, 2) if has_zeros else None
    source = grouped(VALUES, zeros)
    tensor = rows_regrouped(source, (3, 2), (1, 0))
    assert isinstance(tensor, GroupedTensor)
    assert (tensor.bits, tensor.group_size, tensor.has_zeros()) == (8, 2, has_zeros)
    order = [0, 2, 4, 1, 3, 5]
    np.testing.assert_array_equal(to_f32(tensor), to_f32(source)[order])
    groups = tensor.groups(1, 4)
    np.testing.assert_array_equal(groups.codes, VALUES[order][1:4])
    assert (groups.zeros is None) is not has_zeros


def test_a_wrong_number_of_rows_is_named() -> None:
    with pytest.raises(CheckpointError, match="w has 6 rows, 8 were expected"):
        rows_regrouped(f32(VALUES), (4, 2), (1, 0))


def test_shifted_numbers_are_float32_alone() -> None:
    tensor = shifted(f32(VALUES), -1.0)
    np.testing.assert_array_equal(to_f32(tensor), VALUES - 1)
    np.testing.assert_array_equal(to_f32(tensor.rows(2, 4)), VALUES[2:4] - 1)
    with pytest.raises(UnsupportedError, match="w is stored as bf16, f32 was expected"):
        shifted(StoredTensor("w", TensorFormat.BF16, (1,), np.zeros(2, np.uint8)), 1.0)


def test_arranged_tensors_keep_their_names() -> None:
    tensors = {"a": f32(VALUES), "b": f32(VALUES)}
    arranged = Arranged(tensors, {"b": transposed})
    assert list(arranged) == ["a", "b"]
    assert len(arranged) == 2
    assert arranged["a"] is tensors["a"]
    assert arranged["b"].shape == (4, 6)
