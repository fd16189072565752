"""GPTQ (Frantar et al., arXiv 2210.17323): columns are rounded one by one, and those that are left make up
for the error, by the second derivatives of the squared error of the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.compress.quantize.grid import Grid, Scales, find_scales
from fastserve.errors import CheckpointError

BLOCK_COLUMNS = 128  # whose errors reach the columns behind them in one product
_MOST_DAMPING = 1.0  # times the mean of the diagonal: what is not invertible then never is


@dataclass(frozen=True, slots=True, kw_only=True)
class Solver:
    """How columns are rounded.

    Attributes:
        damping: share of the Gram matrix's mean diagonal that is added to its diagonal.
        act_order: columns by falling squares of their activations. Their scales are those of the matrix as it
            is, so that a group remains one of neighbouring columns; else a group's scales are found when its
            first column is reached, by what earlier errors have made of it.
    """

    damping: float = 0.01
    act_order: bool = True

    def plan(self, gram: torch.Tensor, name: str) -> Plan:
        """What all matrices have in common that multiply with the inputs of a Gram matrix [in, in], float64.
        Messages are about the matrix `name`.

        Raises:
            CheckpointError: the Gram matrix cannot be inverted.
        """
        order = torch.arange(len(gram))
        if self.act_order:
            order = torch.argsort(gram.diagonal(), descending=True, stable=True)
        factor = inverse_factor(gram[order][:, order], self.damping, name)
        return Plan(order, factor, has_static_groups=self.act_order)


@dataclass(frozen=True, slots=True)
class Plan:
    """How the columns of some matrices are rounded.

    Attributes:
        order: of columns [in].
        factor: of the inverse of their Gram matrix in this order, as `inverse_factor` gives it.
        has_static_groups: whether scales are those of a matrix as it is before any column is rounded.
    """

    order: torch.Tensor
    factor: torch.Tensor
    has_static_groups: bool

    def quantize(self, name: str, values: torch.Tensor, grid: Grid) -> GroupedTensor:
        """A matrix [out, in]. Its zeros stay zeros.

        >>> w, gram = torch.tensor([[1.2, 3.4]]), torch.eye(2, dtype=torch.float64)
        >>> grid = Grid(granularity="channel", scale_search=False)
        >>> Solver().plan(gram, "w").quantize("w", w, grid).groups(0, 1).codes.tolist()
        [[3, 7]]

        Raises:
            OptionError: the matrix has no such groups.
        """
        columns = grid.columns_of(name, tuple(values.shape))
        depth = values.shape[1]
        scales = find_scales(values, grid, columns)
        state = _Columns(values[:, self.order].T.contiguous(), self.order // columns, scales)
        is_dynamic = not self.has_static_groups and columns < depth
        size = max(BLOCK_COLUMNS, columns) if is_dynamic else BLOCK_COLUMNS
        for begin in range(0, depth, size):
            end = min(begin + size, depth)
            state.round_block(begin, end, self.factor, is_dynamic=is_dynamic)
        codes = torch.empty_like(values)
        codes[:, self.order] = state.codes.T
        return scales.to_tensor(name, codes)


def inverse_factor(gram: torch.Tensor, damping: float, name: str) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of a damped Gram matrix, float32: row i, divided by its
    diagonal, is how the columns from i on make up for an error of column i when those before it are fixed.

    A dead column, that only zeros met, is alone: it makes up for nothing.

    Raises:
        CheckpointError: the matrix cannot be inverted.
    """
    damped = gram.clone()
    diagonal = damped.diagonal()
    is_dead = diagonal <= 0
    mean = diagonal.mean()
    diagonal[is_dead] = 1.0 if mean <= 0 else mean
    while damping <= _MOST_DAMPING:
        lifted = damped + torch.eye(len(damped), dtype=damped.dtype) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(lifted)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            factor: torch.Tensor
            factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed and torch.isfinite(factor).all():
                return factor.to(torch.float32)
        damping = max(damping * 10, 1e-4)  # of too few rows for so many columns
    raise CheckpointError(
        f"what {name} multiplies with has a Gram matrix that cannot be inverted",
        hint="calibrate on more text, or quantize this matrix by rtn",
    )


class _Columns:
    """A matrix on its way to codes, transposed and its columns in the order in which they are rounded.

    Args:
        values: [in, out]; changed.
        groups: of each column, the group of its scales.
    """

    def __init__(self, values: torch.Tensor, groups: torch.Tensor, scales: Scales) -> None:
        self.scales = scales
        self.codes = torch.empty_like(values)  # [in, out]
        self._values = values
        self._groups: list[int] = groups.tolist()
        self._is_zero = values == 0 if bool((values == 0).any()) else None

    def round_block(self, begin: int, end: int, factor: torch.Tensor, *, is_dynamic: bool) -> None:
        """Round some columns in turn, and have those behind them make up for it."""
        block = self._values[begin:end]
        errors = torch.empty_like(block)
        for i, column in enumerate(range(begin, end)):
            group = self._groups[column]
            if is_dynamic and column % self.scales.columns == 0:
                self._find_scales(group, block[i : i + self.scales.columns])
            self.codes[column] = codes = self._codes(block[i], group, column)
            rounded = self.scales.values(codes[:, None, None], [group]).flatten()
            errors[i] = (block[i] - rounded) / factor[column, column]
            block[i + 1 :].addr_(factor[column, column + 1 : end], errors[i], alpha=-1)
        self._values[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)

    def _codes(self, values: torch.Tensor, group: int, column: int) -> torch.Tensor:
        """Of a column [out]; what is exactly zero in the matrix as it was stays zero, whatever others' errors
        would make of it."""
        codes = self.scales.codes(values[:, None, None], [group]).flatten()
        if self._is_zero is None:
            return codes
        zeros = self.scales.zeros
        return torch.where(self._is_zero[column], 0 if zeros is None else zeros[:, group], codes)

    def _find_scales(self, group: int, values: torch.Tensor) -> None:
        """By a group's columns [columns, out] as errors so far have left them."""
        found = find_scales(values.T.contiguous(), self.scales.grid, self.scales.columns)
        self.scales.scales[:, group] = found.scales[:, 0]
        if self.scales.zeros is not None and found.zeros is not None:
            self.scales.zeros[:, group] = found.zeros[:, 0]
