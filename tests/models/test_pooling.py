from __future__ import annotations

from typing import Any

import pytest

from fastserve.errors import UnsupportedError
from fastserve.models.pooling import Pooling

TRANSFORMER = {"type": "sentence_transformers.models.Transformer"}
POOLING = {"type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"type": "sentence_transformers.models.Normalize"}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "first"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "cls"}, "first"),
    ],
)
def test_each_way_of_pooling_is_read(config: dict[str, Any], kind: str) -> None:
    pooling = Pooling.from_sentence_transformers([TRANSFORMER, POOLING], config)
    assert pooling == Pooling(kind, normalize=False)  # type: ignore[arg-type]


def test_a_normalize_module_normalizes() -> None:
    modules = [TRANSFORMER, POOLING, NORMALIZE]
    assert Pooling.from_sentence_transformers(modules, {"pooling_mode": "mean"}).normalize


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "mean and cls"),
        ({}, "nothing"),
        ({"pooling_mode": "weightedmean"}, "weightedmean"),
    ],
)
def test_what_we_do_not_pool_by_is_named(config: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError, match=f"pooling by {named} is not"):
        Pooling.from_sentence_transformers([TRANSFORMER, POOLING], config)


def test_a_module_that_we_do_not_compute_is_named() -> None:
    dense = {"type": "sentence_transformers.models.Dense"}
    with pytest.raises(UnsupportedError, match="Dense"):
        Pooling.from_sentence_transformers([TRANSFORMER, POOLING, dense], {"pooling_mode": "mean"})
