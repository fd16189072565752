"""How much the loss on training rows changes without each unit of a model's layers, to first order."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import partial
from typing import Any

import numpy as np
import torch

from fastserve.compress.calibration import torch_threads
from fastserve.compress.prune.structure import Part
from fastserve.compress.prune.training import task_of, training_rows, write_trainable
from fastserve.compress.prune.unit_score import Scores
from fastserve.compress.step import Context, WorkingModel
from fastserve.data.load import load_data
from fastserve.evaluate.task.collate import collate
from fastserve.evaluate.task.table import TaskOptions, make_task
from fastserve.tune.loss import loss_of
from fastserve.tune.options import TuneOptions
from fastserve.tune.source_model import load_model, open_source_model

_ROWS = 256  # at most: scores are settled by then
_BATCH_ROWS = 8


def score_by_taylor(model: WorkingModel, context: Context, parts: Seq[Part]) -> dict[str, Scores]:
    """Of each unit the sum over batches of |d loss / d gate|, where a gate multiplies what the unit gives: to
    first order what the loss changes by when the unit is taken out (Michel et al., arXiv 1905.10650,
    equation 2; Molchanov et al., arXiv 1611.06440).

    Returns:
        The scores by the name of each part's reader.

    Raises:
        DataError: there are no training rows. As `fastserve.tune.tune`.
    """
    train = training_rows(context, "structured with score='taylor'")
    folder = context.scratch / "taylor"
    write_trainable(model, folder)
    source = open_source_model(str(folder), folder)
    name = task_of(model, context, "structured")
    rows = list(load_data(train, name))[:_ROWS]
    task = make_task(name, rows, TaskOptions(max_length=source.max_tokens))
    torch.manual_seed(context.seed)
    network = load_model(source, task, dropout=0.0).eval()
    for parameter in network.parameters():
        parameter.requires_grad = False
    examples = task.encode(rows, source.tokenizer, with_labels=True)
    loss = loss_of(task, TuneOptions(), examples.features)
    gates = {part.name: _gate(network, part) for part in parts}
    totals = {name: torch.zeros_like(gate) for name, gate in gates.items()}
    num_batches = -(-len(examples.features) // _BATCH_ROWS)
    with torch_threads(context.threads):
        for index in range(num_batches):
            context.progress("scoring units", index, num_batches)
            features = examples.features[index * _BATCH_ROWS : (index + 1) * _BATCH_ROWS]
            arrays = collate(features, pad_token_id=source.tokenizer.pad_token_id)
            batch = {key: torch.from_numpy(array) for key, array in arrays.items()}
            labels = batch.pop("labels")
            found = torch.autograd.grad(loss(network(**batch), labels), list(gates.values()))
            for key, gradient in zip(gates, found, strict=True):
                totals[key] += gradient.abs()
    return {part.name: np.asarray(totals[part.name].double().numpy())[: part.num_units] for part in parts}


def _gate(network: Any, part: Part) -> torch.Tensor:
    """Ones [units] that what the part's units give is multiplied with."""
    name = part.name.removesuffix(".weight")
    modules = dict(network.named_modules())
    reader = modules.get(name) or modules[f"{network.base_model_prefix}.{name}"]
    gate = torch.ones(reader.in_features // part.width, requires_grad=True)
    reader.register_forward_pre_hook(partial(_multiply, gate, part.width))
    return gate


def _multiply(
    gate: torch.Tensor, width: int, module: Any, args: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor]:
    return (args[0] * gate.repeat_interleave(width),)
