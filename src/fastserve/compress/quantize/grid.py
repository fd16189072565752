"""Grids of whole numbers with scales, and the scales that suit a matrix best.

A weight is (code - zero) * scale, by its row and group of neighbouring columns, as the native runtime
computes with it (`backends/native/weight_scheme.py`). Scales are rounded to their format before codes are
chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fastserve.checkpoint.grouped_tensor import GroupedTensor, Groups
from fastserve.checkpoint.tensor import TensorFormat
from fastserve.errors import OptionError
from fastserve.option import check_choice, check_integer

BITS = (8, 4, 3, 2)
KERNEL_GROUPS = (32, 64, 128, 256)  # that the native kernels have, beside whole rows

_FORMATS = {"bf16": (TensorFormat.BF16, torch.bfloat16), "f16": (TensorFormat.F16, torch.float16)}
_NUM_SHRINKS, _LEAST_SHRINK = (
    36,
    0.34,
)  # that a scale search tries, down to what clips two thirds of the range
_ELEMENTS_AT_A_TIME = 2**22

Loss = Callable[[torch.Tensor, int, int], torch.Tensor]
"""What errors [rows, groups, columns] cost, of rows `begin` up to `end`: [rows, groups]."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How a matrix is to be quantized.

    Attributes:
        bits: of the codes: 8, 4, 3 or 2.
        granularity: what shares a scale: the whole `tensor`, a row (`channel`: an output), or a `group` of
            neighbouring columns of a row. None is groups up to 4 bits, and rows above.
        group_size: columns of a group, one of 32, 64, 128, 256.
        symmetric: codes around 0; else each scale has a zero point.
        scale_format: `bf16` or `f16`.
        scale_search: clip the largest weights where that makes the squared error smaller; else scales are by
            the largest magnitude alone.
        misfit: what to do about a matrix whose columns are no multiple of the group size: `refuse` it, or
            take whole rows (`channel`), which is noted.

    Raises:
        OptionError: a value is none of these.

    >>> Grid(bits=3).limits
    (-4, 3)
    """

    bits: int = 4
    granularity: Literal["tensor", "channel", "group"] | None = None
    group_size: int = 64
    symmetric: bool = True
    scale_format: Literal["bf16", "f16"] = "bf16"
    scale_search: bool = True
    misfit: Literal["refuse", "channel"] = "refuse"

    def __post_init__(self) -> None:
        check_integer("bits", self.bits, low=2, high=8)
        check_choice("bits", str(self.bits), tuple(map(str, BITS)))
        if self.granularity is not None:
            check_choice("granularity", self.granularity, ("tensor", "channel", "group"))
        check_integer("group_size", self.group_size, low=32, high=256)
        check_choice("group_size", str(self.group_size), tuple(map(str, KERNEL_GROUPS)))
        check_choice("scale_format", self.scale_format, tuple(_FORMATS))
        check_choice("misfit", self.misfit, ("refuse", "channel"))

    @property
    def limits(self) -> tuple[int, int]:
        """Of codes. Symmetric ones of 8 bits leave out -128, which the kernels do not have."""
        if self.bits == 8 and self.symmetric:
            return -127, 127
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    @property
    def has_groups(self) -> bool:
        return (self.granularity or ("group" if self.bits <= 4 else "channel")) == "group"

    @property
    def shrinks(self) -> list[float]:
        """What a scale search multiplies the range of weights with, from where nothing is clipped."""
        least, most = self.limits
        whole = (most - least) / 2 / most if self.symmetric else 1.0
        return [float(shrink) for shrink in np.linspace(whole, _LEAST_SHRINK, _NUM_SHRINKS)]

    def round_scales(self, scales: torch.Tensor) -> torch.Tensor:
        """Scales in float32 as their format has them."""
        return scales.to(_FORMATS[self.scale_format][1]).float()

    def columns_of(self, name: str, shape: tuple[int, ...]) -> int:
        """How many columns of a matrix share a scale.

        Raises:
            OptionError: the group size does not divide its columns, and `misfit` is `refuse`.
        """
        depth = shape[1]
        if not self.has_groups:
            return depth
        if depth % self.group_size == 0:
            return self.group_size
        if self.misfit == "channel":
            return depth
        fitting = [str(size) for size in KERNEL_GROUPS if depth % size == 0]
        raise OptionError(
            f"{name} [{shape[0]}, {depth}] cannot be quantized in groups of {self.group_size} columns",
            hint=(f"of its {depth} columns, group_size may be {' or '.join(fitting)}; " if fitting else "")
            + "or set misfit: channel, which gives such matrices a scale for each row",
            option="group_size",
        )


@dataclass(frozen=True, slots=True)
class Scales:
    """Scales and zero points [rows, groups] of a matrix, on a grid."""

    grid: Grid
    columns: int  # that share a scale
    scales: torch.Tensor
    zeros: torch.Tensor | None  # whole numbers, as floats

    def codes(self, values: torch.Tensor, groups: slice | list[int] = slice(None)) -> torch.Tensor:
        """The codes nearest to values [rows, groups, columns], as floats; `groups` are those that there are
        values of."""
        return _codes(values, self.scales[:, groups], _some(self.zeros, groups), self.grid)

    def values(self, codes: torch.Tensor, groups: slice | list[int] = slice(None)) -> torch.Tensor:
        """What codes [rows, groups, columns] stand for."""
        zeros = _some(self.zeros, groups)
        less = codes if zeros is None else codes - zeros[:, :, None]
        return less * self.scales[:, groups, None]

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """The numbers on the grid nearest to values [rows, depth]."""
        split = values.reshape(len(values), -1, self.columns)
        return self.values(self.codes(split)).reshape(values.shape)

    def quantize(self, name: str, values: torch.Tensor) -> GroupedTensor:
        """A matrix [rows, depth] by the codes nearest to it."""
        codes = self.codes(values.reshape(len(values), -1, self.columns))
        return self.to_tensor(name, codes.reshape(values.shape))

    def to_tensor(self, name: str, codes: torch.Tensor) -> GroupedTensor:
        """The matrix that codes [rows, depth] stand for."""
        return grouped(
            name,
            codes.to(torch.int8).numpy(),
            self.scales.numpy(),
            None if self.zeros is None else self.zeros.to(torch.int8).numpy(),
            bits=self.grid.bits,
            group_size=self.columns,
            scale_format=_FORMATS[self.grid.scale_format][0],
        )


def find_scales(
    values: torch.Tensor,
    grid: Grid,
    columns: int,
    *,
    loss: Loss | None = None,
    shrinks: Sequence[float] | None = None,
) -> Scales:
    """The scales of a matrix [rows, depth] whose groups are of so many columns: by the largest magnitudes,
    or, where the grid says so, those of them and of shrunken ones whose errors cost least.

    Args:
        loss: what errors cost; None: the sum of their squares.
        shrinks: that a search tries; None: all those of the grid.

    The symmetric scale of a magnitude is that of compressed-tensors (calculate_qparams): it spans the codes
    evenly, so that the largest weight is half a step beyond the largest code.
    """
    rows = len(values)
    is_of_tensor = grid.granularity == "tensor"
    split = values.reshape(1, 1, -1) if is_of_tensor else values.reshape(rows, -1, columns)
    step = max(_ELEMENTS_AT_A_TIME // split[0].numel(), 1)
    found = [
        _search(split[begin : begin + step], begin, grid, loss or _squares, shrinks or grid.shrinks)
        for begin in range(0, len(split), step)
    ]
    scales = torch.cat([scale for scale, _ in found])
    zeros = None if grid.symmetric else torch.cat([zero for _, zero in found])
    if is_of_tensor:
        scales = scales.expand(rows, 1).contiguous()
        zeros = None if zeros is None else zeros.expand(rows, 1).contiguous()
    return Scales(grid, columns, scales, zeros)


def quantize(name: str, values: torch.Tensor, grid: Grid) -> GroupedTensor:
    """A matrix [rows, depth] rounded to nearest.

    >>> values, grid = torch.tensor([[-4.0, 1.0, 0.5, 3.0]]), Grid(granularity="channel", scale_search=False)
    >>> quantize("w", values, grid).groups(0, 1).codes.tolist()
    [[-7, 2, 1, 6]]

    Raises:
        OptionError: the matrix cannot be quantized so.
    """
    columns = grid.columns_of(name, tuple(values.shape))
    return find_scales(values, grid, columns).quantize(name, values)


def grouped(
    name: str,
    codes: NDArray[np.int8],
    scales: NDArray[np.float32],
    zeros: NDArray[np.int8] | None,
    *,
    bits: int,
    group_size: int,
    scale_format: TensorFormat,
) -> GroupedTensor:
    """A tensor in memory of codes [rows, depth], and scales and zero points [rows, groups]."""
    return GroupedTensor(
        name,
        scale_format,
        (codes.shape[0], codes.shape[1]),
        lambda begin, end: Groups(
            codes[begin:end], None if zeros is None else zeros[begin:end], scales[begin:end]
        ),
        lambda: zeros,
        bits=bits,
        group_size=group_size,
    )


def _search(
    values: torch.Tensor, begin: int, grid: Grid, loss: Loss, shrinks: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points [rows, groups] of values [rows, groups, columns]."""
    low, high = values.amin(2).clamp(max=0), values.amax(2).clamp(min=0)
    if grid.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scales, zeros = _scales(low, high, grid)
    if not grid.scale_search:
        return scales, zeros
    least = torch.full_like(scales, torch.inf)
    best_scales, best_zeros = scales, zeros
    for shrink in shrinks:
        scales, zeros = _scales(low * shrink, high * shrink, grid)
        known = None if grid.symmetric else zeros
        errors = _codes(values, scales, known, grid)
        if known is not None:
            errors -= known[:, :, None]
        errors = errors.mul_(scales[:, :, None]).sub_(values)
        cost = loss(errors, begin, begin + len(values))
        is_better = cost < least
        least = torch.where(is_better, cost, least)
        best_scales = torch.where(is_better, scales, best_scales)
        best_zeros = torch.where(is_better, zeros, best_zeros)
    return best_scales, best_zeros


def _scales(low: torch.Tensor, high: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales that span what lies between, as their format has them, and the codes of 0."""
    least, most = grid.limits
    scales = grid.round_scales((high - low) / (most - least))
    if grid.symmetric:
        return scales, torch.zeros_like(scales)
    inverse = torch.where(scales > 0, 1 / scales, 0)
    return scales, (least - low * inverse).round().clamp(least, most)


def _codes(
    values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, grid: Grid
) -> torch.Tensor:
    inverse = torch.where(scales > 0, 1 / scales, 0)
    codes = (values * inverse[:, :, None]).round_()
    if zeros is not None:
        codes += zeros[:, :, None]
    return codes.clamp_(*grid.limits)


def _some(zeros: torch.Tensor | None, groups: slice | list[int]) -> torch.Tensor | None:
    return None if zeros is None else zeros[:, groups]


def _squares(errors: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    return errors.square_().sum(2)
