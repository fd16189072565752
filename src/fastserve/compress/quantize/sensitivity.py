"""How much of a model's predictions is lost where single matrices are rounded, measured by its gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Seq

import numpy as np
import torch

from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.compress.batch_state import make_batches, run_nodes
from fastserve.compress.calibration import graph_of
from fastserve.compress.quantize.step import read_matrix
from fastserve.compress.step import WorkingModel
from fastserve.graph.node import Graph, Parameter
from fastserve.models.family import arrange_tensors, read_config

Rounded = Mapping[str, Mapping[int, GroupedTensor]]
"""Matrices by name, and by the bits that they are rounded to."""


def measure_sensitivity(
    model: WorkingModel,
    rounded: Rounded,
    sequences: Seq[Seq[int]],
    *,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, dict[int, float]]:
    """What each matrix costs where it alone is rounded, by name and bits: of a language model the KL
    divergence to its predictions, in nats a token; of an encoder the squared change of its embeddings over
    their own.

    To second order in the change d of the weights. The divergence is d^T F d / 2 with the Fisher matrix F:
    d^T F d is the mean of (g^T d)^2 over texts and tokens drawn from the model's own predictions, g being the
    gradient of their log-likelihood (Martens, arXiv 1412.1193, section 5). The change of an embedding, J d,
    has the mean of (v^T J d)^2 over normal v as its squared norm. So one backward pass a sequence measures
    all matrices at all bits.

    Holds the model in float32, and the codes of all that is rounded.
    """
    graph = graph_of(model)
    weights = _weights(model, graph, rounded.keys())
    sums = {name: dict.fromkeys(by_bits, 0.0) for name, by_bits in rounded.items()}
    generator = torch.Generator().manual_seed(seed)
    num_rows = 0
    for done, sequence in enumerate(sequences):
        (batch,) = make_batches([sequence])
        values: dict[object, torch.Tensor] = {}
        run_nodes(graph, 0, len(graph.nodes), batch, weights, values)  # type: ignore[arg-type]
        outputs = {name: values[value] for name, value in graph.outputs.items()}
        loss, factor = loss_of_outputs(outputs, generator)
        num_rows += len(sequence) if "logits" in outputs else 1
        parameters = [p for p in weights if p.names[0] in rounded]
        gradients = torch.autograd.grad(loss, [weights[p] for p in parameters])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            (name,) = parameter.names
            own = float((gradient * weights[parameter].detach()).sum(dtype=torch.float64))
            for bits, tensor in rounded[name].items():
                sums[name][bits] += factor * (_dot(gradient, tensor) - own) ** 2
        progress(done + 1)
    return {name: {bits: s / num_rows for bits, s in by_bits.items()} for name, by_bits in sums.items()}


def _weights(model: WorkingModel, graph: Graph, names: Collection[str]) -> dict[Parameter, torch.Tensor]:
    arranged = model.with_tensors(arrange_tensors(read_config(model.config), model.tensors))
    parameters = {parameter for node in graph.nodes for parameter in node.parameters()}
    weights = {parameter: read_matrix(arranged, parameter.names[0]) for parameter in parameters}
    for parameter, values in weights.items():
        values.requires_grad_(parameter.names[0] in names)
    return weights


def loss_of_outputs(
    outputs: Mapping[str, torch.Tensor], generator: torch.Generator
) -> tuple[torch.Tensor, float]:
    """Something drawn of a model's outputs whose gradient g tells what a change d costs: the mean of
    (g^T d)^2 times the factor."""
    if "logits" in outputs:
        return _of_own_predictions(outputs["logits"], generator), 0.5
    return _of_a_direction(outputs["embedding"], generator), 1.0


def _of_own_predictions(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The log-likelihood of tokens that are drawn from the predictions [tokens, vocab] themselves."""
    log_probs = logits.log_softmax(1)
    drawn = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
    return log_probs.gather(1, drawn).sum()


def _of_a_direction(embedding: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Of an embedding [1, width] of length 1, the part along a random vector."""
    length: torch.Tensor = embedding.detach().norm().clamp(min=1e-12)
    along: torch.Tensor = (embedding * torch.randn(embedding.shape, generator=generator)).sum()
    return along / length


def _dot(gradient: torch.Tensor, tensor: GroupedTensor) -> float:
    """The sum of the products of a gradient [out, in] and what codes stand for."""
    codes, zeros, scales = tensor.groups(0, tensor.shape[0])
    split = gradient.reshape(len(gradient), -1, tensor.group_size)
    numbers = torch.from_numpy(codes).float().reshape(split.shape)
    if zeros is not None:
        numbers -= torch.from_numpy(zeros.astype(np.float32))[:, :, None]
    return float(((split * numbers).sum(2) * torch.from_numpy(scales)).sum(dtype=torch.float64))
