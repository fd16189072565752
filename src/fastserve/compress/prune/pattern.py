"""Which entries of a matrix go, by their scores: anywhere, N of each M kept, or whole blocks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fastserve.errors import OptionError
from fastserve.option import check_choice, check_number
from fastserve.types import Float32Array

Mask = NDArray[np.bool_]  # True: goes
Scope = Literal["global", "matrix", "row"]


@dataclass(frozen=True, slots=True)
class Pattern:
    """Where zeros may lie.

    Attributes:
        sparsity: share of entries that go.
        block: rows and columns that go or stay together.
        kept: N of N:M, of each `group` neighbouring columns; None: anywhere.
        group: M of N:M.
    """

    sparsity: float
    block: tuple[int, int] = (1, 1)
    kept: int | None = None
    group: int = 1

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """
        Raises:
            OptionError: the matrix does not part into groups or blocks.
        """
        rows, columns = shape
        if columns % self.group:
            raise OptionError(
                f"{name} is {rows} x {columns}: {self.group} does not divide its {columns} columns, as the"
                f" pattern {self.kept}:{self.group} needs",
                hint="leave the matrix out with targets.exclude, or choose another pattern",
                option="pattern",
            )
        if rows % self.block[0] or columns % self.block[1]:
            raise OptionError(
                f"{name} is {rows} x {columns}: it does not part into blocks of"
                f" {self.block[0]} x {self.block[1]}",
                hint="leave the matrix out with targets.exclude, or choose another pattern",
                option="pattern",
            )


def read_pattern(pattern: str, sparsity: float | None) -> Pattern:
    """What a step's options ask for.

    Args:
        pattern: `unstructured`; `N:M`, as `2:4`: at most N of M neighbouring columns stay; or a block, rows x
            columns, as `1x4`.
        sparsity: share of entries that go, in [0, 1); None is that of N:M, or one half.

    >>> read_pattern("2:4", None).sparsity
    0.5

    Raises:
        OptionError: another pattern, or a sparsity that is out of range or not that of N:M.
    """
    if groups := re.fullmatch(r"(\d+):(\d+)", pattern):
        kept, size = int(groups[1]), int(groups[2])
        if not 0 < kept < size:
            raise OptionError(f"pattern={pattern!r} must keep at least 1 and not all", option="pattern")
        implied = 1 - kept / size
        if sparsity is not None and abs(sparsity - implied) > 1e-6:
            raise OptionError(
                f"sparsity={sparsity} is not that of pattern={pattern!r}, {implied:g}",
                hint="leave it out",
                option="sparsity",
            )
        return Pattern(implied, kept=kept, group=size)
    share = 0.5 if sparsity is None else sparsity
    check_number("sparsity", share, 0.0, 0.999)
    if pattern == "unstructured":
        return Pattern(share)
    block = re.fullmatch(r"(\d+)x(\d+)", pattern)
    if block is None or int(block[1]) * int(block[2]) < 2:
        raise OptionError(
            f"pattern={pattern!r} is none",
            hint="choose unstructured, 2:4, 4:8, 1x4, 16x1, ...",
            option="pattern",
        )
    return Pattern(share, block=(int(block[1]), int(block[2])))


def check_scope(scope: str | None, pattern: Pattern) -> None:
    """
    Raises:
        OptionError: no scope, or one for N:M, which has its own.
    """
    if scope is None:
        return
    check_choice("scope", scope, get_args(Scope))
    if pattern.kept is not None:
        raise OptionError(
            f"scope={scope!r} is not for N:M, which chooses within {pattern.group} columns",
            hint="leave it out",
            option="scope",
        )


def mask_of(scores: Float32Array, pattern: Pattern, *, by_row: bool) -> Mask:
    """Entries with the lowest scores, of each row (of blocks) or of the whole matrix.

    Args:
        scores: [rows, columns], none negative; a block's is the sum of its entries'.

    Of equal scores the first go. The number that goes is `sparsity` times all, rounded.
    """
    if pattern.kept is not None:
        groups = scores.reshape(-1, pattern.group)
        return _lowest_of_rows(groups, pattern.group - pattern.kept).reshape(scores.shape)
    blocks = block_scores(scores, pattern.block)
    if by_row:
        mask = _lowest_of_rows(blocks, round(pattern.sparsity * blocks.shape[1]))
    else:
        mask = lowest(lambda: iter([blocks]), round(pattern.sparsity * blocks.size))(blocks)
    return spread(mask, pattern.block)


def block_scores(scores: Float32Array, block: tuple[int, int]) -> Float32Array:
    """The sums of blocks [rows / block rows, columns / block columns]."""
    if block == (1, 1):
        return scores
    rows, columns = scores.shape
    parted = scores.reshape(rows // block[0], block[0], columns // block[1], block[1])
    return np.asarray(parted.sum(axis=(1, 3), dtype=np.float32))


def spread(mask: Mask, block: tuple[int, int]) -> Mask:
    """The mask of a matrix, from that of its blocks."""
    if block == (1, 1):
        return mask
    return mask.repeat(block[0], axis=0).repeat(block[1], axis=1)


def lowest(scores: Callable[[], Iterable[Float32Array]], count: int) -> Callable[[Float32Array], Mask]:
    """Choose the `count` lowest of the scores of several matrices, however many they are: they are read twice
    and never held together.

    Returns a function that gives the mask of each matrix; it must be called in the order of `scores`, once
    each. Of equal scores the first go.

    Bits of floats that are not negative are in the order of their values: the count-th lowest is found by its
    upper half, then by its lower one.
    """
    upper = np.zeros(2**16, np.int64)
    for matrix in scores():
        upper += np.bincount((_bits(matrix) >> 16).ravel(), minlength=2**16)
    before = np.cumsum(upper)
    if count == 0:
        return lambda matrix: np.zeros(matrix.shape, np.bool_)
    high = int(np.searchsorted(before, count))
    left = count - int(before[high] - upper[high])
    lower = np.zeros(2**16, np.int64)
    for matrix in scores():
        bits = _bits(matrix)
        lower += np.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=2**16)
    before = np.cumsum(lower)
    low = int(np.searchsorted(before, left))
    threshold = high << 16 | low
    ties = left - int(before[low] - lower[low])

    def choose(matrix: Float32Array) -> Mask:
        nonlocal ties
        bits = _bits(matrix)
        mask = bits < threshold
        equal = np.flatnonzero(bits == threshold)[:ties]
        ties -= len(equal)
        mask.reshape(-1)[equal] = True
        return mask

    return choose


def _bits(scores: Float32Array) -> NDArray[np.uint32]:
    # + 0.0 makes 0 of -0, whose bits are the largest there are.
    return np.ascontiguousarray(scores + np.float32(0)).view(np.uint32)


def _lowest_of_rows(scores: Float32Array, count: int) -> Mask:
    order = np.argsort(scores, axis=1, kind="stable")[:, :count]
    mask = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(mask, order, True, axis=1)
    return mask
