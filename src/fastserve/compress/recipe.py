"""The steps that recipes can have, by name."""

from __future__ import annotations

from collections.abc import Mapping

# Where each step's class is: imported when a recipe names it.
STEPS: Mapping[str, str] = {
    "magnitude": "fastserve.compress.prune.magnitude:Magnitude",
    "sparsegpt": "fastserve.compress.prune.sparsegpt:SparseGpt",
    "wanda": "fastserve.compress.prune.wanda:Wanda",
}
