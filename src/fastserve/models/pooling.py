"""How an encoder's token vectors become one embedding a text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fastserve.errors import UnsupportedError
from fastserve.graph.node import PoolKind
from fastserve.types import JsonObject

_MODES: dict[str, PoolKind] = {"mean": "mean", "cls": "first", "lasttoken": "last"}

# Keys of a sentence-transformers `1_Pooling/config.json` from before its `pooling_mode`.
_MODE_FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}


@dataclass(frozen=True, slots=True)
class Pooling:
    """Which token vectors count, and whether the result is scaled to length 1.

    The default, a mean that is not scaled, is what sentence-transformers gives a BERT checkpoint that carries
    no settings of its own.
    """

    kind: PoolKind = "mean"
    normalize: bool = False

    @classmethod
    def from_sentence_transformers(cls, modules: Iterable[JsonObject], pooling: JsonObject) -> Pooling:
        """From the contents of a checkpoint's `modules.json` and of its pooling module's `config.json`.

        >>> modules = [{"type": "sentence_transformers.models.Pooling"}, {"type": "x.Normalize"}]
        >>> Pooling.from_sentence_transformers(modules, {"pooling_mode_cls_token": True})
        Pooling(kind='first', normalize=True)

        Raises:
            UnsupportedError: a way of pooling, several at once, or a module that we do not compute.
        """
        types = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules]
        unknown = sorted(set(types) - {"Transformer", "Pooling", "Normalize"})
        if unknown:
            raise UnsupportedError(
                f"sentence-transformers modules {', '.join(unknown)} are not supported",
                hint="supported are Transformer, Pooling, Normalize",
            )
        modes = [mode for flag, mode in _MODE_FLAGS.items() if pooling.get(flag)]
        if "pooling_mode" in pooling:
            modes = [str(pooling["pooling_mode"])]
        if len(modes) != 1 or modes[0] not in _MODES:
            raise UnsupportedError(
                f"pooling by {' and '.join(modes) or 'nothing'} is not supported",
                hint=f"supported is one of {', '.join(_MODES)}",
            )
        return cls(_MODES[modes[0]], normalize="Normalize" in types)
