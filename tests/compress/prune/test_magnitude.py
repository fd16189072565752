"""Pruning by magnitude on a tiny Llama."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compress.working_models import all_values, make_context, values_of, working_model
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.compress.prune.magnitude import Magnitude
from fastserve.compress.step import Targets
from fastserve.errors import CheckpointError, OptionError
from stored_tensors import random_grouped
from tiny_models import LLAMA_CONFIG

DOWN = "model.layers.1.mlp.down_proj.weight"


def test_the_smallest_weights_of_all_matrices_go_and_nothing_else_changes(tmp_path: Path) -> None:
    model, context = working_model(LLAMA_CONFIG), make_context(tmp_path)
    before = all_values(model)
    after = all_values(Magnitude(sparsity=0.6, scope="global").run(model, context))
    linears = [name for name in before if "proj" in name]
    together = np.concatenate([np.abs(before[name]).ravel() for name in linears])
    limit = np.sort(together)[round(0.6 * len(together)) - 1]
    for name, values in before.items():
        expected = np.where(np.abs(values) <= limit, 0, values) if name in linears else values
        assert (after[name] == expected).all(), name
    assert [layer.name for layer in context.layers] == linears
    assert all(0 < layer.relative_error < 0.5 for layer in context.layers)


@pytest.mark.parametrize("scope", ["matrix", "row"])
def test_each_matrix_or_row_loses_its_share(tmp_path: Path, scope: str) -> None:
    model = working_model(LLAMA_CONFIG)
    after = values_of(Magnitude(sparsity=0.25, scope=scope).run(model, make_context(tmp_path)), DOWN)  # type: ignore[arg-type]
    zeros = after == 0
    assert zeros.sum() == round(0.25 * zeros.size)
    assert set(zeros.sum(axis=1)) == {10} if scope == "row" else len(set(zeros.sum(axis=1))) > 1


def test_zeros_that_are_there_count_so_that_a_second_run_adds_only_what_is_missing(tmp_path: Path) -> None:
    model, context = working_model(LLAMA_CONFIG), make_context(tmp_path)
    once = Magnitude(sparsity=0.7).run(model, context)
    twice = Magnitude(sparsity=0.7).run(Magnitude(sparsity=0.4).run(model, context), context)
    assert (values_of(once, DOWN) == values_of(twice, DOWN)).all()


def test_a_width_that_n_of_m_does_not_divide_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"q_proj.weight is 24 x 24: 16 does not divide its 24 columns"):
        Magnitude(pattern="4:16").run(working_model(LLAMA_CONFIG), make_context(tmp_path))
    with pytest.raises(OptionError, match=r"does not part into blocks of 16 x 1"):
        Magnitude(pattern="16x1").run(working_model(LLAMA_CONFIG), make_context(tmp_path))
    chosen = Targets(include="down_proj")
    Magnitude(pattern="2:4", targets=chosen).run(working_model(LLAMA_CONFIG), make_context(tmp_path))


def test_a_scope_for_n_of_m_and_a_sparsity_out_of_range_are_refused() -> None:
    with pytest.raises(OptionError, match="scope='row' is not for N:M"):
        Magnitude(pattern="2:4", scope="row")
    with pytest.raises(OptionError, match="sparsity=1"):
        Magnitude(sparsity=1.0)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = working_model(LLAMA_CONFIG)
    weights = all_values(model)
    weights[DOWN][3, 4] = np.nan
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.down_proj.weight \[24, 40\] has 1 weights that"):
        Magnitude().run(working_model(LLAMA_CONFIG, weights), make_context(tmp_path))


def test_the_format_of_floats_stays_and_whole_numbers_become_floats_with_a_note(tmp_path: Path) -> None:
    model, context = working_model(LLAMA_CONFIG), make_context(tmp_path)
    rng = np.random.default_rng(0)
    halves = StoredTensor(
        DOWN, TensorFormat.F16, (24, 40), rng.normal(size=960).astype(np.float16).view(np.uint8)
    )
    up = "model.layers.1.mlp.up_proj.weight"
    grouped = random_grouped(TensorFormat.BF16, (40, 24), bits=4, group_size=8, name=up)
    model = model.with_tensors({DOWN: halves, up: grouped})
    pruned = Magnitude(sparsity=0.5).run(model, context)
    assert pruned.tensors[DOWN].format is TensorFormat.F16
    kept = values_of(pruned, DOWN) != 0
    assert (values_of(pruned, DOWN)[kept] == values_of(model, DOWN)[kept]).all()
    assert pruned.tensors[up].format is TensorFormat.F32
    assert "1 quantized matrices were dequantized" in context.notes[0]
