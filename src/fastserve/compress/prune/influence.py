"""How much each layer turns what flows through a model: the less, the better the model does without it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

import torch

from fastserve.backends.torch.ops import OPS
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.tensor import StoredTensor
from fastserve.compress.batch_state import make_batches
from fastserve.compress.calibration import torch_threads
from fastserve.compress.prune.structure import Structure
from fastserve.compress.step import Context, WorkingModel
from fastserve.errors import DataError
from fastserve.graph.node import Parameter, Value
from fastserve.models.family import arrange_tensors, read_config


def layer_influence(model: WorkingModel, context: Context, structure: Structure) -> list[float]:
    """Of each layer 1 - cos(what it reads, what it gives), over all calibration tokens (Men et al., ShortGPT,
    arXiv 2403.03853, equation 1).

    Raises:
        DataError: there are no calibration tokens.
    """
    if not context.calibration:
        raise DataError("there is no calibration text", hint="name a file of text with --calibration")
    streams, graph = structure.streams, structure.graph
    weights = _Weights(arrange_tensors(read_config(model.config), model.tensors))
    last_reads = {value: index for index, node in enumerate(graph.nodes) for value in node.inputs()}
    total = torch.zeros(structure.num_layers, dtype=torch.float64)
    num_tokens = 0
    batches = make_batches(context.calibration)
    with torch_threads(context.threads), torch.no_grad():
        for done, batch in enumerate(batches):
            context.progress("scoring layers", done, len(batches))
            values: dict[Value, torch.Tensor] = {}
            step = batch.step(graph.nodes, weights, values)
            for index, node in enumerate(graph.nodes):
                OPS[type(node)](node, step)
                for value in [v for v in values if v not in streams and last_reads.get(v, -1) <= index]:
                    del values[value]
                if streams[-1] in values:
                    break
            cosines = [
                torch.cosine_similarity(values[before], values[after], dim=1).sum(dtype=torch.float64)
                for before, after in pairwise(streams)
            ]
            total += torch.stack(cosines)
            num_tokens += len(batch.token_ids)
    return [float(value) for value in 1 - total / num_tokens]


class _Weights(Mapping[Parameter, torch.Tensor]):
    """A checkpoint's parameters, each read when it is used, and not kept."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, parameter: Parameter) -> torch.Tensor:
        (name,) = parameter.names
        return torch.from_numpy(to_f32(self._tensors[name]))

    def __iter__(self) -> Iterator[Parameter]:
        return (Parameter((name,), tensor.shape) for name, tensor in self._tensors.items())

    def __len__(self) -> int:
        return len(self._tensors)
