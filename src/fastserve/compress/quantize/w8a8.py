"""Prepares a model for W8A8 as other engines compute it: one scale of int8 for all activations of a token.

Inputs that norms make are smoothed (`smoothquant`). What then still loses too much is found by gradients, and
left alone: these matrices meet activations as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.convert import to_f32, to_float_format
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.compress.batch_state import TokenBatch, make_batches, run_nodes
from fastserve.compress.calibration import graph_of, torch_threads
from fastserve.compress.quantize.sensitivity import loss_of_outputs
from fastserve.compress.quantize.smoothquant import SmoothQuant
from fastserve.compress.station import Station, find_stations
from fastserve.compress.step import Context, WorkingModel
from fastserve.engine.llm import LLM
from fastserve.graph.node import Embedding, Graph, Parameter, Value
from fastserve.models.config import DecoderConfig
from fastserve.models.family import arrange_tensors, read_config
from fastserve.models.matrices import find_matrices
from fastserve.types import SamplingParams

# Measured on SmolLM2-135M (docs/log.md): 0.5 leaves more to activations, 0.8 more to weights.
ALPHA = 0.65
# Of all roundings of activations together, in nats a token (of embeddings: squared, over their own).
MOST_LOSS = 0.001
NUM_SEQUENCES, LENGTH = 16, 128


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model ready to be written as W8A8.

    Attributes:
        checkpoint: of the same function, its scales moved from activations to weights.
        float_activations: names of matrices that meet activations as they are.
        loss_of_all, loss: estimated, where all matrices met int8, and where these do not.
    """

    checkpoint: Checkpoint
    float_activations: frozenset[str]
    loss_of_all: float
    loss: float

    @property
    def line(self) -> str:
        """About it, for a person."""
        return (
            f"{len(self.float_activations)} matrices meet activations as they are: rounding the rest loses an"
            f" estimated {self.loss:.4f}, rounding all would lose {self.loss_of_all:.4f}"
            " (nats a token; of encoders the squared change of embeddings)"
        )


def prepare_w8a8(
    checkpoint: Checkpoint,
    sequences: Seq[Seq[int]],
    *,
    alpha: float = ALPHA,
    most_loss: float = MOST_LOSS,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Prepared:
    """Smooth a model, and choose the matrices whose activations stay as they are: of the inputs that lose
    most, as few as bring the estimated loss of the others down to `most_loss`.

    Args:
        sequences: of token ids, that show what activations are like.

    Raises:
        CheckpointError, UnsupportedError: the model cannot be run.
    """
    names = find_matrices(checkpoint).linears
    model = _with_short_vectors(WorkingModel(checkpoint=checkpoint))
    with TemporaryDirectory(prefix="fastserve-w8a8-") as scratch, torch_threads(None):
        context = Context(
            source=checkpoint.path, scratch=Path(scratch), calibration=sequences, progress=progress
        )
        smooth = SmoothQuant(alpha=alpha).smooth(model, context)
        losses = measure_losses(smooth, names, sequences, progress=progress)
    total = loss = sum(losses.values())
    left_alone: set[str] = set()
    for station in sorted(losses, key=lambda station: -losses[station]):
        if loss <= most_loss:
            break
        loss -= losses[station]
        left_alone |= set(station)
    return Prepared(smooth.checkpoint, frozenset(left_alone), total, max(loss, 0.0))


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


def sample_texts(
    path: Path,
    checkpoint: Checkpoint,
    *,
    num_sequences: int = NUM_SEQUENCES,
    length: int = LENGTH,
    seed: int = 0,
) -> list[list[int]]:
    """Token ids of texts where there are none: those that a decoder itself writes, each from a token that is
    drawn evenly on (as in LLM-QAT, arXiv 2305.17888); for an encoder, tokens that are drawn evenly.
    """
    config = read_config(checkpoint.config)
    random = np.random.default_rng(seed)
    length = min(length, config.max_context)
    if not isinstance(config, DecoderConfig):
        drawn: list[list[int]] = random.integers(0, config.vocab_size, (num_sequences, length)).tolist()
        return drawn
    first = [[int(token_id)] for token_id in random.integers(0, config.vocab_size, num_sequences)]
    params = [
        SamplingParams(max_tokens=length - 1, temperature=1.0, seed=seed + index, ignore_eos=True)
        for index in range(num_sequences)
    ]
    with LLM(path, context_length=length, offline=True) as llm:
        completions = llm.generate(first, params)
    return [[*begin, *made.token_ids] for begin, made in zip(first, completions, strict=True)]


def _with_short_vectors(model: WorkingModel) -> WorkingModel:
    """With vectors as bfloat16 where they are numbers of it, as GGUF never has them: others load them so, and
    scales that are folded into them must be those that are then divided by."""
    changed: dict[str, StoredTensor] = {}
    for name, tensor in model.tensors.items():
        if len(tensor.shape) == 1 and tensor.format is TensorFormat.F32:
            short = StoredTensor(
                name, TensorFormat.BF16, tensor.shape, to_float_format(to_f32(tensor), TensorFormat.BF16)
            )
            if np.array_equal(to_f32(short), to_f32(tensor)):
                changed[name] = short
    return model.with_tensors(changed)


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
