"""Pruning by magnitude: the smallest weights go (Han et al., arXiv 1506.02626)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fastserve.checkpoint.tensor import StoredTensor
from fastserve.compress.prune.matrix import (
    find_prunable,
    note_dequantized,
    note_weights,
    read_matrix,
    write_matrix,
)
from fastserve.compress.prune.pattern import (
    Mask,
    Pattern,
    block_scores,
    check_scope,
    lowest,
    mask_of,
    read_pattern,
    spread,
)
from fastserve.compress.step import Context, Need, Targets, WorkingModel
from fastserve.types import Float32Array


@dataclass(frozen=True, kw_only=True)
class Magnitude:
    """The step `magnitude`.

    Attributes:
        sparsity: share of entries that go, zeros that are there already among them; None is one half, or what
            N:M says.
        pattern: `unstructured`, `N:M` as `2:4`, or blocks of rows x columns as `1x4`, which go by the sum of
            their squares.
        scope: what `sparsity` is a share of: all matrices together, each `matrix`, or each `row`; None is the
            matrix. Not with N:M.

    Raises:
        OptionError: no such pattern or scope, a sparsity out of range.

    >>> Magnitude(pattern="2:4").targets.linears
    True
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    scope: Literal["global", "matrix", "row"] | None = None
    targets: Targets = field(default_factory=Targets)

    def __post_init__(self) -> None:
        check_scope(self.scope, read_pattern(self.pattern, self.sparsity))

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    def check(self, model: WorkingModel, context: Context) -> None:
        """Raises as `Step.check`."""
        find_prunable(model, self.targets, read_pattern(self.pattern, self.sparsity))

    def run(self, model: WorkingModel, context: Context) -> WorkingModel:
        """Raises as `Step.run`."""
        pattern = read_pattern(self.pattern, self.sparsity)
        names = find_prunable(model, self.targets, pattern)
        note_dequantized(context, model, names, "magnitude")
        choose = self._chooser(model, names, pattern)
        changed: dict[str, StoredTensor] = {}
        for done, name in enumerate(names):
            context.progress("magnitude", done, len(names))
            before = read_matrix(model.tensors[name])
            after = np.where(choose(np.square(before)), np.float32(0), before)
            note_weights(context, name, "magnitude", before, after)
            changed[name] = write_matrix(model.tensors[name], after)
        context.progress("magnitude", len(names), len(names))
        return model.with_tensors(changed)

    def _chooser(
        self, model: WorkingModel, names: tuple[str, ...], pattern: Pattern
    ) -> Callable[[Float32Array], Mask]:
        """From the scores of each matrix, in order, to what goes of it."""
        if self.scope != "global":
            return lambda scores: mask_of(scores, pattern, by_row=self.scope == "row")

        def of_blocks() -> Iterator[Float32Array]:
            for name in names:
                yield block_scores(np.square(read_matrix(model.tensors[name])), pattern.block)

        num_blocks = sum(model.tensors[name].shape[0] * model.tensors[name].shape[1] for name in names) // (
            pattern.block[0] * pattern.block[1]
        )
        chosen = lowest(of_blocks, round(pattern.sparsity * num_blocks))
        return lambda scores: spread(chosen(block_scores(scores, pattern.block)), pattern.block)
