"""An adapter from disk as the linears of a model take it, or all that keeps the two apart."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import numpy as np

from fastserve.checkpoint.adapter import Adapter, LowRank, name_problems, tensor_name
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.errors import CheckpointError, OptionError, UnsupportedError
from fastserve.graph.node import Graph, Linear
from fastserve.models.config import EncoderDecoderConfig
from fastserve.models.family import ModelConfig, arrange_tensors
from fastserve.types import Float32Array, LowRankMatrices

logger = logging.getLogger(__name__)

_HEADS = ("lm_head", "embed_out")  # what a tied head is called, which has no tensor of its own


def fit_adapter(
    adapter: Adapter, graph: Graph, config: ModelConfig, tensor_names: Collection[str], *, max_rank: int
) -> dict[str, LowRankMatrices]:
    """What an adapter adds to a model's linears, by the name of their tensors.

    `graph` is the model's before it is optimized, built of `config`, and `tensor_names` are the checkpoint's:
    what is not computed of it needs no adapter. Rows of an adapter's matrices are in the order that the
    checkpoint has; here they are in that of the graph.

    Raises:
        CheckpointError: it changes modules that the model has not, or of another shape, or holds numbers that
            are none; the first of all these are named.
        UnsupportedError: what it changes cannot be added beside the model: DoRA, embeddings, experts, and
            whatever belongs to an encoder-decoder.
        OptionError: a rank is above `max_rank`.
    """
    _check_can_be_added(adapter, config)
    linears = {node.weight.names[0]: node.weight.shape for node in graph.nodes if isinstance(node, Linear)}
    others = {n for node in graph.nodes for p in node.parameters() for n in p.names if n not in linears}
    found: dict[str, LowRankMatrices] = {}
    problems, unsupported = [], []
    for module, low_rank in adapter.matrices.items():
        name = _linear_name(module, linears, graph)
        if name is None:
            if tensor_name(module, others) is not None:
                unsupported.append(module)
            elif tensor_name(module, tensor_names) is not None:
                logger.info("%s: what it adds to %s is not used", adapter.path, module)
            else:
                problems.append(f"{module} is not there")
            continue
        shape = (low_rank.b.shape[0], low_rank.a.shape[1])
        if low_rank.is_embedding:
            unsupported.append(module)
        elif shape != linears[name]:
            problems.append(f"{module} has shape {list(linears[name])}, the adapter's {list(shape)}")
        elif not _is_finite(low_rank):
            problems.append(f"{module} has numbers that are not finite")
        else:
            found[name] = LowRankMatrices(low_rank.a, _scaled_up(name, low_rank, config))
    if problems:
        raise CheckpointError(
            f"{adapter.path} is no adapter of the model: {name_problems(problems)}",
            hint=f"it was trained on {adapter.base}"
            if adapter.base
            else "choose the model it was trained on",
        )
    if unsupported:
        raise UnsupportedError(
            f"{adapter.path} changes {name_problems(unsupported)}, and only linear layers can have adapters",
            hint=_merge_hint(adapter),
        )
    _check_ranks(adapter, max_rank)
    return found


def _check_can_be_added(adapter: Adapter, config: ModelConfig) -> None:
    if isinstance(config, EncoderDecoderConfig):
        raise UnsupportedError(
            f"adapters are not added beside encoder-decoder models ({config.model_type})",
            hint=_merge_hint(adapter),
        )
    magnitudes = [module for module, matrix in adapter.matrices.items() if matrix.magnitudes is not None]
    if magnitudes:
        raise UnsupportedError(
            f"{adapter.path} is a DoRA adapter, which scales the rows of the model's matrices and cannot be "
            "added beside it",
            hint=_merge_hint(adapter),
        )


def _check_ranks(adapter: Adapter, max_rank: int) -> None:
    module, rank = max(((m, len(matrix.a)) for m, matrix in adapter.matrices.items()), key=lambda r: r[1])
    if rank > max_rank:
        raise OptionError(
            f"{adapter.path} has rank {rank} at {module}, the limit is max_adapter_rank={max_rank}",
            hint=f"set max_adapter_rank to {rank} or more",
            option="max_adapter_rank",
        )


def _merge_hint(adapter: Adapter) -> str:
    return (
        "merge it into a model of its own: "
        f"`fastserve convert MODEL --adapter {adapter.path} --to safetensors --output DIR`"
    )


def _linear_name(module: str, linears: Mapping[str, tuple[int, ...]], graph: Graph) -> str | None:
    name = tensor_name(module, linears)
    head = graph.head()
    if name is None and head is not None and module.rpartition(".")[2] in _HEADS:
        return head.weight.names[0]
    return name


def _is_finite(low_rank: LowRank) -> bool:
    """A row that does not have the adapter would not notice; who has it would get no numbers."""
    return bool(np.isfinite(low_rank.a).all() and np.isfinite(low_rank.b).all())


def _scaled_up(name: str, low_rank: LowRank, config: ModelConfig) -> Float32Array:
    """`b` times the scale, its rows in the order of the graph's: they are arranged as those of the matrix
    that it is added to."""
    stored = np.ascontiguousarray(low_rank.b.T if low_rank.is_transposed else low_rank.b)
    tensor = StoredTensor(name, TensorFormat.F32, stored.shape, stored.reshape(-1).view(np.uint8))
    arranged = arrange_tensors(config, {name: tensor})[name]
    return to_f32(arranged) * np.float32(low_rank.scale)
