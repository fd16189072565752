"""SparseGPT: weights go by what it costs to lose them, and those that stay make up for it (Frantar &
Alistarh, arXiv 2301.00774)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fastserve.compress.prune.by_outputs import Prune, prune_by_outputs
from fastserve.compress.prune.matrix import find_prunable
from fastserve.compress.prune.pattern import Pattern, mask_of, read_pattern
from fastserve.compress.step import Context, Need, Targets, WorkingModel
from fastserve.errors import CheckpointError
from fastserve.option import check_integer, check_number


@dataclass(frozen=True, kw_only=True)
class SparseGpt:
    """The step `sparsegpt`.

    Attributes:
        sparsity, pattern: as of the step `magnitude`. Blocks go by the sum of their costs.
        block_size: columns whose mask is chosen at once, over all rows, and after which the columns to the
            right are made up (B and B_s of the paper, section 3); whole groups of N:M or blocks, at least.
        damping: share of the mean of the Hessian's diagonal that is added to it.

    Raises:
        OptionError: no such pattern, a number out of range.
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    block_size: int = 128
    damping: float = 0.01
    targets: Targets = field(default_factory=Targets)

    def __post_init__(self) -> None:
        read_pattern(self.pattern, self.sparsity)
        check_integer("block_size", self.block_size, low=1)
        check_number("damping", self.damping, 0.0, 10.0, is_low_open=True)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration"})

    def check(self, model: WorkingModel, context: Context) -> None:
        """Raises as `Step.check`."""
        find_prunable(model, self.targets, read_pattern(self.pattern, self.sparsity))

    def run(self, model: WorkingModel, context: Context) -> WorkingModel:
        """Raises as `Step.run`."""
        return prune_by_outputs(self, model, context, name="sparsegpt")

    def pruner(self, gram: torch.Tensor, pattern: Pattern, name: str) -> Prune:
        """What prunes the matrices that multiply with the inputs of a Gram matrix [in, in]."""
        factor = inverse_factor(gram, damping=self.damping, name=name)
        return lambda weights: prune_and_update(weights, factor, pattern, block_size=self.block_size)


def inverse_factor(gram: torch.Tensor, *, damping: float, name: str) -> torch.Tensor:
    """The upper Cholesky factor U of the inverse Hessian [in, in], float32: U[j, j:] * U[j, j] is the first
    row of the inverse of the Hessian of columns j, j + 1, ... alone (section 3.3 of arXiv 2210.17323).

    Inputs that are always 0 count as independent of all others.

    Raises:
        CheckpointError: the Hessian is not positive definite, for all damping.
    """
    hessian = gram.to(torch.float64, copy=True)
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(hessian)
    inverse = torch.cholesky_inverse(lower)
    upper, failed_too = torch.linalg.cholesky_ex(inverse, upper=True)
    if failed or failed_too:
        raise CheckpointError(
            f"the Hessian of the inputs of {name} is not positive definite",
            hint="give more calibration text, or more damping",
        )
    factor: torch.Tensor = upper.float()
    return factor


def prune_and_update(
    weights: torch.Tensor, factor: torch.Tensor, pattern: Pattern, *, block_size: int
) -> torch.Tensor:
    """Algorithm 1 of the paper.

    Args:
        weights: [out, in].
        factor: of `inverse_factor` [in, in].

    Returns:
        The weights that are left, in float32 [out, in]; what goes is exactly 0.
    """
    unit = pattern.group if pattern.kept is not None else pattern.block[1]
    width = -(-block_size // unit) * unit
    weights = weights.clone()
    for begin in range(0, weights.shape[1], width):
        end = min(begin + width, weights.shape[1])
        errors = _prune_columns(weights[:, begin:end], factor[begin:end, begin:end], pattern)
        weights[:, end:] -= errors @ factor[begin:end, end:]
    return weights


def _prune_columns(block: torch.Tensor, factor: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Prune some columns in place, one after the other. Returns what each has lost, over the factor's
    diagonal [out, columns]."""
    diagonal = factor.diagonal()
    errors = torch.zeros_like(block)
    step = pattern.group if pattern.kept is not None else block.shape[1]
    mask = torch.zeros(block.shape, dtype=torch.bool)
    for column in range(block.shape[1]):
        if column % step == 0:
            chosen = slice(column, column + step)
            costs = (block[:, chosen] / diagonal[chosen]).square()
            mask[:, chosen] = torch.from_numpy(mask_of(costs.numpy(), pattern, by_row=False))
        gone = mask[:, column]
        error = torch.where(gone, block[:, column] / diagonal[column], 0)
        block[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
        block[gone, column] = 0
        errors[:, column] = error
    return errors
