"""What a station's inputs say of its matrices: their Gram matrix, and the error of outputs by it."""

from __future__ import annotations

import torch

from fastserve.compress.station import Station


class Gram:
    """Adds up x.T @ x of the rows that a station sees, in float32."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None

    def add(self, x: torch.Tensor) -> None:
        """Rows [rows, in]."""
        product = x.T @ x
        self._sum = product if self._sum is None else self._sum.add_(product)

    def take(self, station: Station) -> torch.Tensor:
        """The sum [in, in]; it begins anew."""
        assert self._sum is not None, f"{station.names} were never observed"
        total, self._sum = self._sum, None
        return total


def output_error(before: torch.Tensor, after: torch.Tensor, gram: torch.Tensor) -> float:
    """Squared norm of the change of x @ W.T over that of x @ W.T, all rows together."""
    whole = _energy(before, gram)
    return _energy(before - after, gram) / whole if whole else 0.0


def _energy(weights: torch.Tensor, gram: torch.Tensor) -> float:
    return float(((weights @ gram) * weights).sum(dtype=torch.float64))
