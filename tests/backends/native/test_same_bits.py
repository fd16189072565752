"""Logits have the same bits alone and in any batch, in any chunks, on any number of threads: in every weight
format, however its values are stored, on every instruction set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from fastserve import _native
from fastserve.backends.native.executable import NativeExecutable, compile_native
from fastserve.backends.native.storage_choice import StorageChoice
from fastserve.backends.native.weight_scheme import SCHEMES, SPARSE_STORAGES, STORED_SCHEMES, Storage
from fastserve.checkpoint.tensor import TensorFormat
from fastserve.config import WeightFormat
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Graph
from fastserve.types import Limits
from native_graphs import VOCAB, columns, misaligned, random_parameters
from parity import Run, run_logits, step_together, store_f32
from stored_tensors import CAN_BE_SPARSE, random_stored, random_with_zeros

DEPTH, WIDTH, HEAD_DIM = 160, 64, 16
LIMITS = Limits(max_tokens=310, max_outputs=310, max_sequences=4, num_blocks=64, max_context=512)
PROMPT = np.random.default_rng(3).integers(0, VOCAB, size=290).tolist()


@dataclass(frozen=True)
class Format:
    """A weight format, the format that the file has, and the way that values are stored in memory."""

    weights: WeightFormat
    stored: TensorFormat = TensorFormat.F32
    storage: Storage = "dense"

    def __str__(self) -> str:
        stored = f" {self.stored.value}" if self.weights == "stored" else ""
        return f"{self.weights}{stored} {self.storage}"


# One format of each scheme.
STORED = list({scheme: stored for stored, scheme in reversed(STORED_SCHEMES.items())}.values())
SPARSE = [
    *(
        Format(name, storage=s)
        for name, of in SCHEMES.items()
        if of in CAN_BE_SPARSE
        for s in SPARSE_STORAGES
    ),
    *(
        Format("stored", stored, s)
        for stored in STORED
        if STORED_SCHEMES[stored] in CAN_BE_SPARSE
        for s in SPARSE_STORAGES
    ),
]
FORMATS = [*map(Format, SCHEMES), *(Format("stored", stored) for stored in STORED), *SPARSE]


def make_graph() -> Graph:
    """Two products, of rows that lie misaligned, with attention between."""
    b = GraphBuilder()
    y = b.linear(misaligned(b, "x", DEPTH), "qkv", width=3 * WIDTH)
    q, k, v = (columns(b, y, start, WIDTH) for start in (0, WIDTH, 2 * WIDTH))
    z = b.attention(q, k, v, layer_index=0, head_dim=HEAD_DIM, scale=0.25, causal=True)
    return b.finish(logits=b.gather_rows(b.linear(z, "head", width=70)))


def compile_format(of: Format, *, threads: int, isa: str) -> NativeExecutable:
    graph = make_graph()
    tensors = store_f32(random_parameters(graph))
    scheme = STORED_SCHEMES[of.stored] if of.weights == "stored" else SCHEMES[of.weights]
    for name, shape in (("qkv", (3 * WIDTH, DEPTH)), ("head", (70, WIDTH))):
        if of.storage != "dense":
            tensors[name] = random_with_zeros(scheme, shape, 0.9, name)
        elif of.weights == "stored":
            tensors[name] = random_stored(of.stored, shape, name)
    return compile_native(
        graph,
        tensors,
        weights=of.weights,
        limits=LIMITS,
        threads=threads,
        isa=isa,
        storage_choice=StorageChoice("a machine"),
    )


@pytest.mark.parametrize("isa", _native.runnable_isas())
@pytest.mark.parametrize("of", FORMATS, ids=str)
def test_rows_do_not_depend_on_their_company_their_chunks_or_the_threads(
    of: Format, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Register tiles of every height, blocks of rows of a linear, strips, and chunks of attention."""
    monkeypatch.setattr(StorageChoice, "choose", lambda *_: of.storage)
    alone, *others = (compile_format(of, threads=threads, isa=isa) for threads in (1, 2, 3))
    with alone.profiling() as calls:
        whole = run_logits(alone, PROMPT)
    assert np.isfinite(whole).all()
    if of.storage != "dense":
        assert any(call.shape.endswith(of.storage) for call in calls if call.op == "linear")
    for chunk in (1, 2, 3, 5, 7, 13, 97, 256):
        np.testing.assert_array_equal(run_logits(alone, PROMPT, chunk=chunk), whole)
    for executable in others:
        for chunk in (11, 290):
            np.testing.assert_array_equal(run_logits(executable, PROMPT, chunk=chunk), whole)
        runs = [Run(executable, place) for place in range(3)]
        step_together([(runs[0], PROMPT[:200]), (runs[1], PROMPT[:1]), (runs[2], PROMPT[:33])])
        together = step_together(
            [(runs[2], PROMPT[33:40]), (runs[0], PROMPT[200:]), (runs[1], PROMPT[1:180])]
        )
        for logits, rows in zip(together, (slice(33, 40), slice(200, None), slice(1, 180)), strict=True):
            np.testing.assert_array_equal(logits, whole[rows])
