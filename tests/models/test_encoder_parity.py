"""Every family of encoders and every feature of it against `transformers`, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from fastserve.graph.node import (
    Activation,
    Attention,
    Embedding,
    GatedActivation,
    Graph,
    LayerNorm,
    Node,
    Parameter,
    Rope,
)
from fastserve.models.family import build_graph, read_config
from fastserve.models.parameters import expected_parameters
from fastserve.types import Float32Array
from parity import BACKENDS, RANGE_BOUND, compile_graph, range_error, run_embeddings
from tiny_encoders import ENCODERS, hf_encoder, hf_vectors
from tiny_models import hf_parameters

SHORT_TEXTS = [list(range(5, 45)), [7], [3, 3, 96, 12, 50]]


def texts_for(config: dict[str, Any]) -> list[list[int]]:
    """Texts as long as the family's context, up to one that is longer than all that a relative bias tells
    apart, and short ones."""
    length = min(170, read_config(config).max_context)
    return [np.random.default_rng(0).integers(5, 97, length).tolist(), *SHORT_TEXTS]


def run(backend: str, config: dict[str, Any], parameters: dict[str, Float32Array]) -> Float32Array:
    executable = compile_graph(backend, build_graph(read_config(config)), parameters, max_context=192)
    long, *short = texts_for(config)
    return np.concatenate([run_embeddings(executable, [long]), run_embeddings(executable, short)])


def expect(config: dict[str, Any], model: Any) -> Float32Array:
    return np.stack([hf_vectors(model, ids).mean(0) for ids in texts_for(config)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ENCODERS)
def test_embeddings_equal_the_mean_that_transformers_gives(backend: str, name: str) -> None:
    config = ENCODERS[name]
    model = hf_encoder(config)
    assert range_error(run(backend, config, hf_parameters(model)), expect(config, model)) < RANGE_BOUND


@pytest.mark.parametrize("name", ENCODERS)
def test_a_family_reads_exactly_what_transformers_saves(name: str) -> None:
    config = ENCODERS[name]
    saved = {key: array.shape for key, array in hf_parameters(hf_encoder(config)).items()}
    assert expected_parameters(build_graph(read_config(config))) == saved


# Mutations: what a plausible mistake changes must be more than the bound allows.


def with_other_eps(node: Node) -> Node:
    """10 times it, or what others have where that is below float32's reach."""
    return replace(node, eps=10 * max(node.eps, 1e-5)) if isinstance(node, LayerNorm) else node


def with_other_activation(node: Node) -> Node:
    if not isinstance(node, Activation | GatedActivation):
        return node
    return replace(node, kind="gelu" if node.kind == "gelu_tanh" else "gelu_tanh")


def with_positions_one_row_early(node: Node) -> Node:
    is_position = isinstance(node, Embedding) and node.ids == "positions"
    return replace(node, offset=node.offset - 1) if is_position else node


def with_bias(**changes: Any) -> Callable[[Node], Node]:
    def change(node: Node) -> Node:
        return replace(node, bias=replace(node.bias, **changes)) if isinstance(node, Attention) else node

    return change


def without_bias(node: Node) -> Node:
    return replace(node, bias=None) if isinstance(node, Attention) else node


def with_window_plus(tokens: int | None) -> Callable[[Node], Node]:
    """Windows that are so much wider; None: no windows."""

    def change(node: Node) -> Node:
        if not isinstance(node, Attention) or node.window is None:
            return node
        return replace(node, window=None if tokens is None else node.window + tokens)

    return change


def with_slower_rope(node: Node) -> Node:
    if not isinstance(node, Rope):
        return node
    frequencies = tuple(0.99 * frequency for frequency in node.table.inverse_frequencies)
    return replace(node, table=replace(node.table, inverse_frequencies=frequencies))


def with_heads_scaled_as_if_wider(node: Node) -> Node:
    return replace(node, scale=0.99 * node.scale) if isinstance(node, Attention) else node


def with_first_group_for_all(node: Node) -> Node:
    def first(value: Any) -> Any:
        if not isinstance(value, Parameter):
            return value
        return replace(value, names=tuple(name.replace("groups.1", "groups.0") for name in value.names))

    return replace(node, **{f.name: first(getattr(node, f.name)) for f in fields(node)})


EVERY_FAMILY = ("bert", "roberta", "mpnet", "distilbert", "albert", "modernbert")
MUTATIONS: list[tuple[str, Callable[[Node], Node]]] = [
    *product(EVERY_FAMILY, (with_other_eps, with_other_activation, with_heads_scaled_as_if_wider)),
    *product(("roberta", "mpnet"), [with_positions_one_row_early]),
    ("mpnet", without_bias),
    ("mpnet", with_bias(max_distance=127)),
    ("mpnet", with_bias(bidirectional=False)),
    *product(["modernbert"], (with_window_plus(1), with_window_plus(-1), with_window_plus(None))),
    ("modernbert", with_slower_rope),
    ("albert, two groups of weights", with_first_group_for_all),
]


@pytest.mark.parametrize(("name", "change"), MUTATIONS)
def test_a_plausible_mistake_exceeds_the_bound(name: str, change: Callable[[Node], Node]) -> None:
    config = ENCODERS[name]
    model = hf_encoder(config)
    graph = build_graph(read_config(config))
    mutant = Graph(tuple(change(node) for node in graph.nodes), graph.outputs)
    executable = compile_graph("torch", mutant, hf_parameters(model), max_context=192)
    long = texts_for(config)[:1]
    assert range_error(run_embeddings(executable, long), expect(config, model)[:1]) > RANGE_BOUND
