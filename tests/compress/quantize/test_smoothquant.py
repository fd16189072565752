"""Smoothing moves the range of activations into weights, and leaves the model what it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from compress.working_models import TINY, calibrated_context, random_working_model, working_model
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.tensor import StoredTensor
from fastserve.compress.calibration import walk
from fastserve.compress.quantize.smoothquant import SmoothQuant
from fastserve.compress.quantize.step import Rtn
from fastserve.compress.station import Station
from fastserve.compress.step import Targets, WorkingModel
from tiny_models import LLAMA_CONFIG, random_parameters, tiny_graph

QKV = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]


class Inputs:
    """Keeps what the matrices of the first station multiply with."""

    key = "inputs"

    def __init__(self) -> None:
        self.rows: list[torch.Tensor] = []

    def observe(self, station: Station, x: torch.Tensor) -> None:
        self.rows.append(x.clone())

    def finish(self, station: Station) -> Mapping[str, StoredTensor]:
        return {}


def first_inputs(model: WorkingModel, folder: Path) -> torch.Tensor:
    inputs = Inputs()
    walk(model, calibrated_context(folder), inputs, names=QKV)
    return torch.cat(inputs.rows)


def with_outliers() -> WorkingModel:
    parameters = random_parameters(tiny_graph(LLAMA_CONFIG))
    parameters["model.layers.0.input_layernorm.weight"][[5, 11]] *= 40
    return working_model(LLAMA_CONFIG, parameters)


def of_int8(x: torch.Tensor) -> torch.Tensor:
    """Rows rounded to int8, each with its own scale."""
    scales = x.abs().amax(1, keepdim=True) / 127
    return (x / scales).round() * scales


def test_products_of_int8_are_nearer_to_those_of_floats(tmp_path: Path) -> None:
    model = with_outliers()
    x = first_inputs(model, tmp_path / "x")
    errors = {}
    for name, step in (("smooth", SmoothQuant()), ("plain", Rtn(bits=8))):
        quantized = step.run(model, calibrated_context(tmp_path))
        inputs = of_int8(first_inputs(quantized, tmp_path / name))
        difference = [
            inputs @ torch.from_numpy(to_f32(quantized.tensors[m])).T
            - x @ torch.from_numpy(to_f32(model.tensors[m])).T
            for m in QKV
        ]
        errors[name] = sum(float(part.square().sum()) for part in difference)
    assert errors["smooth"] < 0.5 * errors["plain"]


def test_scales_are_those_of_the_paper(tmp_path: Path) -> None:
    model = with_outliers()
    activations = first_inputs(model, tmp_path / "x").abs().amax(0).numpy()
    weights = np.stack([np.abs(to_f32(model.tensors[name])).max(axis=0) for name in QKV]).max(axis=0)
    smooth = SmoothQuant(alpha=0.7).run(model, calibrated_context(tmp_path))
    norm = "model.layers.0.input_layernorm.weight"
    found = to_f32(model.tensors[norm]) / to_f32(smooth.tensors[norm])
    np.testing.assert_allclose(found, activations**0.7 / weights**0.3, rtol=1e-4)


def test_its_matrices_meet_activations_of_int8(tmp_path: Path) -> None:
    model = random_working_model(TINY["bert"])
    context = calibrated_context(tmp_path)
    quantized = SmoothQuant(targets=Targets(exclude="layer.2")).run(model, context)
    assert quantized.int8_activations == set(model.matrices(Targets(exclude="layer.2")))
    # Every norm of a post-norm encoder is read by the residual too.
    assert context.notes == ["smoothquant: 0 of 8 inputs come from norms that take scales"]
