from __future__ import annotations

from collections.abc import Callable

import pytest

from fastserve.backends.native.layout import lay_out
from fastserve.errors import UnsupportedError
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Value
from fastserve.types import Limits


@pytest.mark.parametrize(
    ("what", "make"),
    [
        ("embeddings with an offset", lambda b, _: b.embedding("positions", "p", size=8, width=8, offset=2)),
        ("rms_norm of groups", lambda b, x: b.rms_norm(x, "norm", eps=1e-5, group=4)),
        ("rms_norm with an offset", lambda b, x: b.rms_norm(x, "norm", eps=1e-5, offset=1.0)),
        ("layer_norm without a bias", lambda b, x: b.layer_norm(x, "norm", None, eps=1e-5)),
        ("soft_cap", lambda b, x: b.soft_cap(x, 30.0)),
        ("scale", lambda b, x: b.scale(x, 30.0)),
        (
            "attention with a window",
            lambda b, x: b.attention(x, x, x, layer_index=0, head_dim=4, scale=1.0, causal=True, window=4),
        ),
    ],
)
def test_what_has_no_kernel_is_refused_by_name(
    what: str, make: Callable[[GraphBuilder, Value], Value]
) -> None:
    b = GraphBuilder()
    graph = b.finish(logits=make(b, b.embedding("token_ids", "x", size=9, width=8)))
    with pytest.raises(UnsupportedError, match=f"native backend has no {what}"):
        lay_out(graph, {}, Limits())
