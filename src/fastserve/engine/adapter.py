"""An adapter beside a model, as requests have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from fastserve.engine.block import PrefixKey
from fastserve.types import LowRankMatrices


@dataclass(frozen=True, slots=True, eq=False)
class ServedAdapter:
    """An adapter as a model takes it. One that is loaded again under the same name is another: requests keep
    the one that they began with.

    Attributes:
        digest: of its files: what was computed with another is of no use to it.
        matrices: by the name of the tensor that they are added to.
    """

    name: str
    path: Path
    digest: bytes
    matrices: Mapping[str, LowRankMatrices]

    @property
    def rank(self) -> int:
        """The highest of its matrices."""
        return max(len(matrix.down) for matrix in self.matrices.values())

    def scope(self, scope: PrefixKey) -> PrefixKey:
        """Who shares prefixes with a request that has this adapter, of those in a scope."""
        return blake2b(self.digest, key=scope, digest_size=16).digest()
