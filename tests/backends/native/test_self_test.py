from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("fastserve._native")

from fastserve.backends.native import self_test
from fastserve.backends.native.executable import runnable_isas
from fastserve.backends.native.self_test import SelfTest, run_self_test
from fastserve.graph.passes import optimize
from fastserve.models.family import build_graph, read_config


def test_the_stored_logits_are_those_of_the_torch_backend() -> None:
    pytest.importorskip("torch")
    from fastserve.backends.torch.executable import compile_torch

    graph = build_graph(read_config(self_test.CONFIG))
    executable = compile_torch(
        optimize(graph),
        self_test.make_parameters(graph),
        limits=self_test.LIMITS,
        kv_dtype="f32",
        block_size=32,
    )
    logits = self_test.run_logits(executable, [len(self_test.TOKEN_IDS)])
    assert np.abs(logits - self_test.EXPECTED_LOGITS).max() < 1e-5


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize("threads", [1, 3])
def test_every_instruction_set_passes(isa: str, threads: int) -> None:
    result = run_self_test(isa=isa, threads=threads)
    assert result.isa == isa
    assert result.is_passed, result


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 1e-4}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10100.0}}]
)
def test_a_model_that_computes_something_else_fails(
    change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_test, "CONFIG", {**self_test.CONFIG, **change})
    assert not run_self_test().is_passed


def test_chunks_that_differ_or_logits_that_are_no_numbers_fail() -> None:
    right = {"f32": 0.0, "int8": 0.0}
    assert SelfTest(isa="portable", differences=right, chunks_agree=True).is_passed
    assert not SelfTest(isa="portable", differences=right, chunks_agree=False).is_passed
    wrong = {**right, "f32": float("nan")}
    assert not SelfTest(isa="portable", differences=wrong, chunks_agree=True).is_passed
