from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest

from fastserve import _native
from fastserve.backends.native.executable import make_runtime
from fastserve.backends.native.weight_scheme import (
    INT8,
    SCHEMES,
    STORED_SCHEMES,
    WeightScheme,
    choose_schemes,
    kept_scheme,
)
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.config import WeightFormat
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Graph
from fastserve.graph.passes import optimize
from stored_tensors import random_grouped


@pytest.fixture
def graph() -> Graph:
    """An embedding, two linears that will be one, and a head."""
    b = GraphBuilder()
    x = b.embedding("token_ids", "embed", size=40, width=96)
    y = b.add(b.linear(x, "q", width=64), b.linear(x, "k", width=64))
    return optimize(b.finish(logits=b.linear(b.gather_rows(y), "head", width=40)))


def store_as(formats: dict[str, TensorFormat]) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(name, stored, (0, 0), np.zeros(0, np.uint8)) for name, stored in formats.items()
    }


def by_name(schemes: dict[object, WeightScheme]) -> dict[str, WeightScheme]:
    return {" ".join(parameter.names): scheme for parameter, scheme in schemes.items()}  # type: ignore[attr-defined]


def test_every_name_has_a_scheme_but_stored() -> None:
    assert {*SCHEMES, "stored"} == set(get_args(WeightFormat))


def test_a_name_is_the_scheme_of_every_matrix(graph: Graph) -> None:
    assert set(choose_schemes(graph, "bf16", {}).values()) == {SCHEMES["bf16"]}


@pytest.mark.parametrize("weights", ["int4", "int4:g32:asymmetric"])
def test_int4_leaves_embedding_and_head_int8(graph: Graph, weights: WeightFormat) -> None:
    schemes = by_name(choose_schemes(graph, weights, {}))
    assert schemes == {"embed": INT8, "q k": SCHEMES[weights], "head": INT8}


def test_int4_leaves_a_head_int8_whose_logits_are_capped_afterwards() -> None:
    b = GraphBuilder()
    x = b.linear(b.embedding("token_ids", "embed", size=40, width=96), "q", width=64)
    graph = optimize(b.finish(logits=b.soft_cap(b.gather_rows(b.linear(x, "head", width=40)), 30.0)))
    assert by_name(choose_schemes(graph, "int4", {})) == {"embed": INT8, "q": SCHEMES["int4"], "head": INT8}


def test_stored_is_the_files_own_format_matrix_by_matrix(graph: Graph) -> None:
    q8, q4 = TensorFormat.Q8_0, TensorFormat.Q4_1
    tensors = store_as({"embed": q8, "q": q4, "k": q4, "head": TensorFormat.BF16})
    assert by_name(choose_schemes(graph, "stored", tensors)) == {
        "embed": STORED_SCHEMES[q8],
        "q k": STORED_SCHEMES[q4],
        "head": SCHEMES["bf16"],
    }


def test_stacked_matrices_of_different_stored_formats_become_float32_and_that_is_logged(
    graph: Graph, caplog: pytest.LogCaptureFixture
) -> None:
    q8, q4 = TensorFormat.Q8_0, TensorFormat.Q4_1
    tensors = store_as({"embed": q8, "q": q4, "k": q8, "head": q8})
    assert by_name(choose_schemes(graph, "stored", tensors))["q k"] == SCHEMES["f32"]
    assert "q and k are stored in different formats (q4_1, q8_0)" in caplog.text


def grouped(names: str, **kind: Any) -> dict[str, StoredTensor]:
    return {name: random_grouped(TensorFormat.BF16, (64, 96), name=name, **kind) for name in names.split()}


@pytest.mark.parametrize(
    ("weights", "bits", "group_size", "is_kept"),
    [
        ("int8", 8, 32, True),
        ("int8", 4, 32, True),
        ("int8:g64", 8, 96, True),
        ("int4", 4, 32, True),
        ("int4", 8, 32, False),
        ("int8", 8, 16, False),
        ("bf16", 8, 32, False),
        ("stored", 8, 32, True),
    ],
)
def test_whole_numbers_of_no_more_bits_are_kept(
    graph: Graph, weights: WeightFormat, bits: int, group_size: int, is_kept: bool
) -> None:
    tensors = grouped("q k", bits=bits, group_size=group_size) | store_as(
        {"embed": TensorFormat.BF16, "head": TensorFormat.BF16}
    )
    schemes = by_name(choose_schemes(graph, weights, tensors))
    kept = kept_scheme(tensors["q"])
    assert kept.format == ("bf16" if group_size == 16 else f"int{bits}")
    assert (schemes["q k"] == kept) == is_kept
    assert weights == "stored" or schemes["embed"] in (SCHEMES[weights], INT8)


def test_stacked_whole_numbers_of_different_kinds_are_rounded(graph: Graph) -> None:
    tensors = grouped("q", bits=8, group_size=32) | grouped("k", bits=4, group_size=32)
    assert by_name(choose_schemes(graph, "int8", tensors))["q k"] == INT8


@pytest.mark.parametrize(("causal", "storage"), [(True, "chosen"), (False, "dense")])
def test_linears_of_decoders_alone_have_their_storage_chosen(causal: bool, storage: str) -> None:
    """Tied embeddings are linears too; those that no linear reads stay dense."""
    b = GraphBuilder()
    x = b.add(
        b.embedding("token_ids", "embed", size=40, width=64),
        b.embedding("positions", "positions", size=40, width=64),
    )
    q, k, v = (b.linear(x, name, width=64) for name in "qkv")
    y = b.attention(q, k, v, layer_index=0, head_dim=32, scale=1.0, causal=causal)
    graph = optimize(b.finish(logits=b.linear(b.gather_rows(y), "embed", width=40)))
    schemes = by_name(choose_schemes(graph, "int8", {}))
    assert {name: scheme.storage for name, scheme in schemes.items()} == {
        "embed": storage,
        "positions": "dense",
        "q k v": storage,
    }
    assert {scheme.storage for scheme in choose_schemes(graph, "int4:asymmetric", {}).values()} <= {
        "dense",
        storage,
    }
    assert {scheme.storage for scheme in choose_schemes(graph, "f16", {}).values()} == {"dense"}


@pytest.mark.parametrize(("rows", "depth"), [(1, 1), (64, 64), (65, 172), (130, 576)])
@pytest.mark.parametrize("weights", SCHEMES)
def test_the_memory_that_is_told_is_what_the_packed_matrix_takes(
    weights: WeightFormat, rows: int, depth: int
) -> None:
    scheme = SCHEMES[weights]
    packed = _native.Weight(
        make_runtime(),
        [("f32", np.zeros(4 * rows * depth, np.uint8), rows, depth)],
        scheme.format,
        group_size=scheme.group_size,
        activation_group_size=scheme.activation_group_size,
        offset=scheme.offset,
    )
    assert packed.num_bytes == scheme.num_bytes(rows, depth)
