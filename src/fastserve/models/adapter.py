"""An adapter from disk as the linears of a model take it, or all that keeps the two apart."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fastserve.checkpoint.adapter import Adapter, LowRank, name_problems, near_name, tensor_name
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.errors import CheckpointError, OptionError, UnsupportedError
from fastserve.graph.node import Graph, Linear
from fastserve.graph.passes.add_adapters import max_rank_at
from fastserve.models.family import ModelConfig, arrange_tensors
from fastserve.types import Float32Array, LowRankMatrices

logger = logging.getLogger(__name__)

_HEADS = ("lm_head", "embed_out")  # what a tied head is called, which has no tensor of its own
_ROWS_AT_ONCE = 4096  # of a matrix whose rows' lengths are taken
_PARTS = {"weight", "bias"}  # of a layer that can be replaced


def fit_adapter(
    adapter: Adapter,
    graph: Graph,
    config: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    *,
    max_rank: int,
) -> dict[str, LowRankMatrices]:
    """What an adapter makes of the results of a model's linears, by the name of their tensors.

    `graph` is the model's before it is optimized, built of `config`; of an encoder-decoder those of both
    parts. `tensors` are its tensors as the graph takes them: what is not computed of them needs no adapter.
    Rows of an adapter's matrices are in the order that the checkpoint has; here they are in that of the
    graph. A layer that it replaces (`modules_to_save`) becomes a product with the new matrix, beside which
    the old one does not count.

    Raises:
        CheckpointError: it changes modules that the model has not, or of another shape, or holds numbers that
            are none; the first of all these are named.
        UnsupportedError: what it changes cannot be added beside the model: embeddings, norms, experts.
        OptionError: a rank is above `max_rank`.
    """
    return _Fitting(adapter, graph, config, tensors, max_rank).fit()


class _Fitting:
    """Of one adapter: what fits so far, and what does not."""

    def __init__(
        self,
        adapter: Adapter,
        graph: Graph,
        config: ModelConfig,
        tensors: Mapping[str, StoredTensor],
        max_rank: int,
    ) -> None:
        self._adapter = adapter
        self._graph = graph
        self._config = config
        self._tensors = tensors
        self._max_rank = max_rank
        self._linears = {node.weight.names[0]: node for node in graph.nodes if isinstance(node, Linear)}
        names = {name for node in graph.nodes for p in node.parameters() for name in p.names}
        self._others = names - self._linears.keys()
        self._problems: list[str] = []
        self._unsupported: list[str] = []

    def fit(self) -> dict[str, LowRankMatrices]:
        found: dict[str, LowRankMatrices] = {}
        for module, low_rank in self._adapter.matrices.items():
            name = self._find(module, f"{module}.weight")
            if name is not None and (matrices := self._added(module, name, low_rank)) is not None:
                found[name] = matrices
        saved: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
        for tensor_name_, tensor in self._adapter.saved.items():
            module, _, part = tensor_name_.rpartition(".")
            saved[module][part] = tensor
        for module, parts in saved.items():
            name = self._find(module, f"{module}.{next(iter(parts))}")
            if name is not None and (matrices := self._replaced(module, name, parts)) is not None:
                found[name] = matrices
        self._check()
        self._check_ranks(found)
        return found

    def _find(self, module: str, its_tensor: str) -> str | None:
        """The linear that a module is; None where it is none, which is taken down."""
        name = tensor_name(module, self._linears)
        if name is not None:
            return name
        head = self._graph.head()
        if head is not None and module.rpartition(".")[2] in _HEADS:
            return head.weight.names[0]
        if near_name(its_tensor, self._others) is not None:
            self._unsupported.append(module)
        elif near_name(its_tensor, self._tensors) is not None:
            logger.info("%s: what it has for %s is not used", self._adapter.path, module)
        else:
            self._problems.append(f"{module} is not there")
        return None

    def _added(self, module: str, name: str, low_rank: LowRank) -> LowRankMatrices | None:
        if low_rank.is_embedding:
            self._unsupported.append(module)
            return None
        if not self._has_shape(module, name, (low_rank.b.shape[0], low_rank.a.shape[1])):
            return None
        up = self._arranged(name, low_rank.b.T if low_rank.is_transposed else low_rank.b)
        matrices = LowRankMatrices(low_rank.a, up * np.float32(low_rank.scale))
        if low_rank.magnitudes is not None:
            column = low_rank.magnitudes[:, None]
            magnitudes = self._arranged(name, column.T if low_rank.is_transposed else column)
            matrices = self._with_factors(name, matrices, magnitudes[:, 0])
        return matrices if self._is_finite(module, matrices) else None

    def _with_factors(
        self, name: str, matrices: LowRankMatrices, magnitudes: Float32Array
    ) -> LowRankMatrices:
        """Of DoRA: rows of W + up down get these lengths (arXiv 2402.09353, equation 5). W is what is stored,
        dequantized, as in peft."""
        stored = self._tensors[name]
        lengths = np.empty(len(magnitudes), np.float32)
        for begin in range(0, len(lengths), _ROWS_AT_ONCE):
            rows = slice(begin, min(begin + _ROWS_AT_ONCE, len(lengths)))
            merged = to_f32(stored.rows(rows.start, rows.stop)) + matrices.up[rows] @ matrices.down
            lengths[rows] = np.linalg.norm(merged, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            factors = magnitudes / lengths
        shifts = (1 - factors) * self._bias(name)
        return replace(matrices, up=matrices.up * factors[:, None], factors=factors, shifts=shifts)

    def _bias(self, name: str) -> Float32Array:
        bias = self._linears[name].bias
        if bias is None:
            return np.zeros(self._linears[name].out.width, np.float32)
        return to_f32(self._tensors[bias.names[0]])

    def _replaced(self, module: str, name: str, parts: Mapping[str, StoredTensor]) -> LowRankMatrices | None:
        if not parts.keys() <= _PARTS or "weight" not in parts or len(parts["weight"].shape) != 2:
            self._unsupported.append(module)
            return None
        arranged = arrange_tensors(self._config, {name: replace(parts["weight"], name=name)})[name]
        weight = to_f32(arranged)
        if not self._has_shape(module, name, weight.shape):
            return None
        rows, columns = weight.shape
        bias = to_f32(parts["bias"]) if "bias" in parts else self._bias(name)
        if bias.shape != (rows,):
            self._problems.append(f"{module} has a bias of shape {list(bias.shape)} for {rows} rows")
            return None
        matrices = LowRankMatrices(
            down=weight if rows <= columns else np.eye(columns, dtype=np.float32),
            up=np.eye(rows, dtype=np.float32) if rows <= columns else weight,
            factors=np.zeros(rows, np.float32),
            shifts=bias,
        )
        return matrices if self._is_finite(module, matrices) else None

    def _has_shape(self, module: str, name: str, shape: tuple[int, ...]) -> bool:
        expected = self._linears[name].weight.shape
        if shape != expected:
            self._problems.append(f"{module} has shape {list(expected)}, the adapter's {list(shape)}")
        return shape == expected

    def _is_finite(self, module: str, matrices: LowRankMatrices) -> bool:
        """A row that does not have the adapter would not notice; who has it would get no numbers."""
        arrays = (matrices.down, matrices.up, matrices.factors, matrices.shifts)
        is_finite = all(array is None or np.isfinite(array).all() for array in arrays)
        if not is_finite:
            self._problems.append(f"{module} has numbers that are not finite")
        return is_finite

    def _arranged(self, name: str, matrix: Float32Array) -> Float32Array:
        """Rows that are added to those of a stored matrix, in the order of the graph's."""
        stored = np.ascontiguousarray(matrix)
        tensor = StoredTensor(name, TensorFormat.F32, stored.shape, stored.reshape(-1).view(np.uint8))
        return to_f32(arrange_tensors(self._config, {name: tensor})[name])

    def _check(self) -> None:
        adapter = self._adapter
        if self._problems:
            raise CheckpointError(
                f"{adapter.path} is no adapter of the model: {name_problems(self._problems)}",
                hint=f"it was trained on {adapter.base}"
                if adapter.base
                else "choose the model it was trained on",
            )
        if self._unsupported:
            raise UnsupportedError(
                f"{adapter.path} changes {name_problems(self._unsupported)}, and only linear layers can have "
                "adapters",
                hint=_merge_hint(adapter),
            )

    def _check_ranks(self, found: Mapping[str, LowRankMatrices]) -> None:
        """The highest of all that is too high is named."""
        limits = {name: max_rank_at(self._linears[name], self._max_rank) for name in found}
        ranks = {name: len(m.down) for name, m in found.items() if len(m.down) > limits[name]}
        if not ranks:
            return
        name, rank = max(ranks.items(), key=lambda item: item[1])
        factors = found[name].factors
        takes = "has rank" if factors is None or factors.any() else "replaces a layer, which takes rank"
        raise OptionError(
            f"{self._adapter.path} {takes} {rank} at {name.removesuffix('.weight')}, the limit is "
            f"max_adapter_rank={self._max_rank}",
            hint=f"set max_adapter_rank to {rank} or more, or {_merge_hint(self._adapter)}",
            option="max_adapter_rank",
        )


def _merge_hint(adapter: Adapter) -> str:
    return (
        "merge it into a model of its own: "
        f"`fastserve convert MODEL --adapter {adapter.path} --to safetensors --output DIR`"
    )
