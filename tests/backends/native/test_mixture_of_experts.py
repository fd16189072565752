"""Experts natively: against the torch backend, and the same bits whoever shares their batch."""

from __future__ import annotations

import numpy as np
import pytest

from fastserve import _native
from fastserve.backends.native.executable import NativeExecutable, compile_native
from fastserve.backends.native.weight_scheme import SCHEMES, choose_schemes
from fastserve.backends.torch.executable import compile_torch
from fastserve.config import WeightFormat
from fastserve.evaluate.profile import LINEARS
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.check import check_graph
from fastserve.graph.node import Graph, MixtureOfExperts
from fastserve.graph.passes import optimize
from fastserve.types import Float32Array, Limits
from native_graphs import VOCAB, random_parameters
from parity import Run, make_batch, run_logits, store_f32

LIMITS = Limits(max_tokens=256, max_outputs=256, max_sequences=4, num_blocks=32, max_context=256)
IDS = np.random.default_rng(1).integers(0, VOCAB, size=230).tolist()
ISAS = _native.runnable_isas()


def experts_graph(
    *, width: int = 64, inner_width: int = 128, num_experts: int = 5, top_k: int = 2, normalized: bool = True
) -> Graph:
    """A norm and a mixture of experts with its residual, whose last rows alone are outputs."""
    b = GraphBuilder()
    x = b.embedding("token_ids", "x", size=VOCAB, width=width)
    normed = b.rms_norm(x, "norm", eps=1e-5)
    names = ([f"{part}{expert}" for expert in range(num_experts)] for part in ("gate", "up", "down"))
    mixed = b.mixture_of_experts(
        normed, "router", *names, inner_width=inner_width, top_k=top_k, normalized=normalized, kind="silu"
    )
    return b.finish(logits=b.gather_rows(b.add(x, mixed)))


def parameters_of(graph: Graph) -> dict[str, Float32Array]:
    """Random parameters, matrices scaled so that values keep their size."""
    found = random_parameters(graph)
    return {name: a / np.float32(a.shape[1] ** 0.5) if a.ndim == 2 else a for name, a in found.items()}


def compile_experts(graph: Graph, weights: WeightFormat, isa: str, threads: int = 1) -> NativeExecutable:
    stored = store_f32(parameters_of(graph))
    return compile_native(optimize(graph), stored, weights=weights, limits=LIMITS, isa=isa, threads=threads)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("width", "inner_width"), [(64, 128), (24, 40), (130, 65)])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (5, 2), (16, 4), (3, 3)])
def test_it_equals_torch(
    num_experts: int, top_k: int, width: int, inner_width: int, normalized: bool, isa: str
) -> None:
    graph = experts_graph(
        width=width, inner_width=inner_width, num_experts=num_experts, top_k=top_k, normalized=normalized
    )
    check_graph(optimize(graph))
    expected = run_logits(compile_torch(graph, parameters_of(graph), limits=LIMITS), IDS)
    actual = run_logits(compile_experts(graph, "f32", isa), IDS)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=4e-6 * np.abs(expected).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("weights", "tolerance"), [("bf16", 0.01), ("int8", 0.03), ("int4", 0.25)])
def test_rounded_experts_stay_near_to_those_of_float32(
    weights: WeightFormat, tolerance: float, isa: str
) -> None:
    graph = experts_graph()
    parameters = parameters_of(graph)
    expected = run_logits(compile_torch(graph, parameters, limits=LIMITS), IDS) - parameters["x"][IDS]
    actual = run_logits(compile_experts(graph, weights, isa), IDS) - parameters["x"][IDS]
    assert np.linalg.norm(actual - expected) < tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weights", ["f32", "int8", "int4:g32"])
def test_a_row_has_the_same_bits_in_any_company_and_on_any_number_of_threads(
    weights: WeightFormat, isa: str
) -> None:
    graph = experts_graph(num_experts=7, top_k=3)
    whole = run_logits(compile_experts(graph, weights, isa), IDS)
    executable = compile_experts(graph, weights, isa, threads=2)
    np.testing.assert_array_equal(run_logits(executable, IDS), whole)
    np.testing.assert_array_equal(run_logits(executable, IDS, chunk=7), whole)
    np.testing.assert_array_equal(run_logits(executable, IDS[:9], chunk=1), whole[:9])


def test_rows_that_are_not_numbers_spoil_no_others() -> None:
    graph = experts_graph()
    parameters = parameters_of(graph)
    parameters["x"][3] = np.nan
    executable = compile_native(
        optimize(graph), store_f32(parameters), weights="int8", limits=LIMITS, threads=1
    )
    logits = run_logits(executable, [1, 3, 2])
    assert np.isnan(logits[1]).all()
    np.testing.assert_array_equal(logits[[0, 2]], run_logits(executable, [1, 2]))


def test_a_step_without_output_rows_routes_nothing() -> None:
    graph = experts_graph()
    executable = compile_experts(graph, "f32", ISAS[0])
    batch = make_batch([(Run(executable), [1, 2, 3])])
    object.__setattr__(batch, "output_rows", np.zeros(0, np.int32))
    assert executable.run(batch).outputs["logits"].shape == (0, 64)


def test_the_profile_tells_its_parts_apart() -> None:
    executable = compile_experts(experts_graph(), "int8", ISAS[0])
    with executable.profiling() as calls:
        run_logits(executable, IDS)
    parts = {call.op: call.shape for call in calls}
    assert parts["expert_gated_activation"] == "128x64 of 5"
    assert parts["expert_linear"] == "64x128 of 5"
    assert {"expert_gated_activation", "expert_linear"} <= set(LINEARS)
    assert {"route_experts", "gather_expert_rows", "combine_experts"} <= parts.keys()


def test_routers_are_float32_and_experts_share_a_scheme() -> None:
    graph = experts_graph()
    schemes = choose_schemes(graph, "int4", store_f32(parameters_of(graph)))
    (node,) = (node for node in graph.nodes if isinstance(node, MixtureOfExperts))
    assert schemes[node.router] == SCHEMES["f32"]
    assert {schemes[p] for p in (*node.gates, *node.ups, *node.downs)} == {SCHEMES["int4"]}
