"""What calibration tells of a station: the products of its inputs' columns, summed over rows."""

from __future__ import annotations

import torch

from fastserve.compress.station import Station
from fastserve.errors import CheckpointError


class Gram:
    """X^T X of all rows x that were added: half the Hessian of the squared error of X W^T.

    Attributes:
        num_rows: that were added.
        largest: of each column's magnitudes [in].
        total: of each column's magnitudes [in], added up.
    """

    def __init__(self, width: int) -> None:
        self._sums = torch.zeros(width, width, dtype=torch.float64)
        self.num_rows = 0
        self.largest = torch.zeros(width)
        self.total = torch.zeros(width, dtype=torch.float64)

    def add(self, x: torch.Tensor) -> None:
        """Rows [rows, in]."""
        self._sums += x.T @ x  # float32 within a batch, float64 over batches
        self.num_rows += len(x)
        magnitudes = x.abs()
        self.largest = torch.maximum(self.largest, magnitudes.amax(0))
        self.total += magnitudes.sum(0)

    @property
    def mean_magnitude(self) -> torch.Tensor:
        """Of each column [in]."""
        return (self.total / max(self.num_rows, 1)).float()

    def matrix(self, name: str) -> torch.Tensor:
        """X^T X / rows [in, in], float64.

        Raises:
            CheckpointError: it is not finite; `name` is that of the matrix that multiplies with X.
        """
        matrix = self._sums / max(self.num_rows, 1)
        if not torch.isfinite(matrix).all():
            raise CheckpointError(
                f"what {name} multiplies with is too large to be calibrated on: its squares are not finite",
                hint="the model's activations overflow; take it from its source again",
            )
        return matrix


class GramVisitor:
    """A visitor of a walk, as of `fastserve.compress.calibration.Visitor`, that adds up each station's rows;
    its `finish` takes what they came to."""

    def __init__(self) -> None:
        self._gram: Gram | None = None

    def observe(self, station: Station, x: torch.Tensor) -> None:
        self._gram = self._gram or Gram(x.shape[1])
        self._gram.add(x)

    def take(self) -> Gram:
        """Of all rows of the station that was observed; the next one begins anew."""
        assert self._gram is not None
        gram, self._gram = self._gram, None
        return gram


def output_error(change: torch.Tensor, gram: torch.Tensor) -> float:
    """Mean over rows x of |x change^T|^2, for the change of a matrix [out, in] and a Gram matrix [in, in]."""
    gram = gram.to(change.dtype)
    return float((change @ gram * change).sum(dtype=torch.float64))


def relative_output_error(before: torch.Tensor, after: torch.Tensor, gram: torch.Tensor) -> float:
    """How much of a matrix's output is lost: squared norm of the change over that of the output."""
    whole = output_error(before, gram)
    return output_error(after - before, gram) / whole if whole > 0 else 0.0
