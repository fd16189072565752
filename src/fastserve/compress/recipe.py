"""The steps that recipes can have, by name."""

from __future__ import annotations

from collections.abc import Mapping

# Where each step's class is: imported when a recipe names it.
STEPS: Mapping[str, str] = {
    "gradual": "fastserve.compress.prune.gradual:Gradual",
    "lottery": "fastserve.compress.prune.lottery:Lottery",
    "magnitude": "fastserve.compress.prune.magnitude:Magnitude",
    "recover": "fastserve.compress.prune.recover:Recover",
    "sparsegpt": "fastserve.compress.prune.sparsegpt:SparseGpt",
    "structured": "fastserve.compress.prune.structured:Structured",
    "wanda": "fastserve.compress.prune.wanda:Wanda",
}
