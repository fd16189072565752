"""What is lost where inputs of matrices are rounded to int8 with one scale for each token, as other engines
compute W8A8, and which inputs had better stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from fastserve.checkpoint.convert import to_f32
from fastserve.compress.batch_state import TokenBatch, make_batches, run_nodes
from fastserve.compress.calibration import graph_of
from fastserve.compress.quantize.sensitivity import loss_of_outputs
from fastserve.compress.station import Station, find_stations
from fastserve.compress.step import WorkingModel
from fastserve.graph.node import Embedding, Graph, Parameter, Value
from fastserve.models.family import arrange_tensors, read_config


@dataclass(frozen=True, slots=True)
class Kept:
    """Names of the matrices whose inputs stay as they are, and what rounding all others loses."""

    names: frozenset[str]
    loss: float


def keep_costly(losses: Mapping[tuple[str, ...], float], most_loss: float) -> Kept:
    """Of the inputs that lose most, as few as bring the loss of the others down to `most_loss`.

    Args:
        losses: as `measure_losses` finds them.
    """
    loss = sum(losses.values())
    names: set[str] = set()
    for station in sorted(losses, key=lambda station: -losses[station]):
        if loss <= most_loss:
            break
        loss -= losses[station]
        names |= set(station)
    return Kept(frozenset(names), max(loss, 0.0))


def measure_losses(
    model: WorkingModel,
    names: Collection[str],
    sequences: Seq[Seq[int]],
    *,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[tuple[str, ...], float]:
    """What is lost where the input of single stations is rounded to int8 with a scale for each token, by the
    names of the station's matrices: the KL divergence of predictions in nats a token, or the squared change
    of embeddings over their own.

    To second order, as `sensitivity`: the mean of half of (g^T d)^2, d being the error and g the gradient of
    the log-likelihood of drawn tokens by the input; of embeddings, of (g^T d)^2. So one backward pass a
    sequence measures all. Errors of the numbers that predict tokens are taken to be independent, which makes
    half of the sum of (g d)^2 of it, and needs few draws; in a mean over tokens like errors add up.

    Holds the model in float32, and all values of a sequence.
    """
    graph = graph_of(model)
    stations = find_stations(graph, names)
    weights = _weights(model, graph)
    generator = torch.Generator().manual_seed(seed)
    sums = dict.fromkeys((station.names for station in stations), 0.0)
    num_rows = 0
    for done, batch in enumerate(make_batches(sequences, num_tokens=1)):
        inputs, outputs = _run(graph, stations, batch, weights)
        loss, factor = loss_of_outputs(outputs, generator)
        num_rows += len(batch.token_ids) if "logits" in outputs else 1
        for station, x, gradient in zip(stations, inputs, torch.autograd.grad(loss, inputs), strict=True):
            parts = (gradient * (round_tokens(x.detach()) - x.detach())).double()
            lost = parts.square().sum() if "logits" in outputs else parts.sum().square()
            sums[station.names] += factor * float(lost)
        progress("activations", done + 1, len(sequences))
    return {names: total / num_rows for names, total in sums.items()}


def round_tokens(x: torch.Tensor) -> torch.Tensor:
    """Values [tokens, width] as int8 with a scale for each token stands for them, as compressed-tensors has
    it (quantization/utils/helpers.py, calculate_qparams: symmetric, the range of 255 steps)."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).eps) / 127.5
    return (x / scale).round().clamp(-128, 127) * scale


def _run(
    graph: Graph,
    stations: Seq[Station],
    batch: TokenBatch,
    weights: dict[Parameter, torch.Tensor],
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The inputs of stations, and the outputs, with what gradients need."""
    values: dict[Value, torch.Tensor] = {}
    inputs: list[torch.Tensor] = []
    position = 0
    for station in stations:
        run_nodes(graph, position, station.position, batch, weights, values)
        position = station.position
        inputs.append(values[station.x])
    run_nodes(graph, position, len(graph.nodes), batch, weights, values)
    return inputs, {name: values[value] for name, value in graph.outputs.items()}


def _weights(model: WorkingModel, graph: Graph) -> dict[Parameter, torch.Tensor]:
    arranged = arrange_tensors(read_config(model.config), model.tensors)
    tables = {node.weight for node in graph.nodes if isinstance(node, Embedding) and node.ids == "token_ids"}
    parameters = {parameter for node in graph.nodes for parameter in node.parameters()}
    weights = {p: torch.from_numpy(to_f32(arranged[p.names[0]])) for p in parameters}
    for table in tables:  # from there on gradients are kept
        weights[table].requires_grad_(True)
    return weights
