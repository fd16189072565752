"""Compiling a graph for torch: its weights as tensors and a KV pool; running it: one function call a node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, get_args

import numpy as np
import torch

from fastserve.backends.adapter import AdapterSites, PlacedMatrices
from fastserve.backends.bounds import BatchBounds
from fastserve.backends.torch.ops import OPS
from fastserve.backends.torch.sample import sample
from fastserve.backends.torch.step import AddedRows, KvLayer, Step
from fastserve.backends.torch.step import PlacedMatrices as TorchMatrices
from fastserve.config import KvDtype
from fastserve.errors import OptionError
from fastserve.graph.node import Graph, Parameter, PoolNode
from fastserve.graph.passes import add_adapters
from fastserve.option import check_choice
from fastserve.types import (
    NO_ADAPTER,
    Batch,
    Float32Array,
    Limits,
    LowRankMatrices,
    StepResult,
    UInt8Array,
)


def compile_torch(
    graph: Graph,
    parameters: Mapping[str, Float32Array],
    *,
    limits: Limits,
    kv_dtype: KvDtype = "f32",
    block_size: int = 32,
    device: str = "cpu",
    encoder: Graph | None = None,
) -> TorchExecutable:
    """Compile a graph, optimized or not; of a decoder that reads sources, with the graph of its `encoder`.

    `parameters` holds every tensor that the graphs name, float32 and in the graph's shapes (see
    `fastserve.models.parameters.check_parameters`); they are copied. Keys and values are stored as `kv_dtype`
    and read back as stored; everything else is float32.

    >>> from fastserve.graph.builder import GraphBuilder
    >>> b = GraphBuilder()
    >>> graph = b.finish(logits=b.gather_rows(b.embedding("token_ids", "embed.weight", size=2, width=3)))
    >>> compile_torch(graph, {"embed.weight": np.zeros((2, 3), np.float32)}, limits=Limits()).vocab_size
    2

    Raises:
        OptionError: an unknown `kv_dtype`, a `block_size` below 1, or a `device` that this torch does not
            have.
        MemoryError: the device has too little memory.
    """
    check_choice("kv_dtype", kv_dtype, get_args(KvDtype))
    if block_size < 1:
        raise OptionError(f"block_size={block_size} is below 1")
    _check_device(device)
    slots = limits.num_blocks * block_size
    nodes = (*encoder.nodes, *graph.nodes) if encoder else graph.nodes
    shapes = {n.pool_layer: (slots, n.num_kv_heads, n.head_dim) for n in nodes if isinstance(n, PoolNode)}
    try:
        weights = {
            parameter: _to_tensor(parameter, parameters, device)
            for parameter in {p for node in nodes for p in node.parameters()}
        }
        kv = {layer: KvLayer.zeros(shape, kv_dtype, device) for layer, shape in shapes.items()}
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error)) from error
    sites = AdapterSites(
        graph.beside(encoder) if encoder else graph,
        {name: len(array) for name, array in parameters.items()},
        limits,
    )
    return TorchExecutable(
        _Program.of(graph, limits, block_size),
        weights,
        kv,
        sites,
        encoder=_Program.of(encoder, limits, block_size) if encoder else None,
    )


@dataclass(frozen=True, slots=True)
class _Program:
    """A graph, the same with adapters, and what its batches may hold."""

    graph: Graph
    adapted: Graph
    bounds: BatchBounds

    @classmethod
    def of(cls, graph: Graph, limits: Limits, block_size: int) -> Self:
        adapted = add_adapters(graph, limits.max_adapter_rank)
        return cls(graph, adapted, BatchBounds.from_graph(graph, limits, block_size))

    def graph_for(self, batch: Batch) -> Graph:
        slots = batch.adapter_slots
        return self.graph if slots is None or (slots == NO_ADAPTER).all() else self.adapted


class TorchExecutable:
    """Implements `fastserve.types.Executable`, and with an encoder `SourceExecutable`, by interpreting
    graphs. Made by `compile_torch`."""

    def __init__(
        self,
        program: _Program,
        weights: Mapping[Parameter, torch.Tensor],
        kv: Mapping[int, KvLayer],
        sites: AdapterSites,
        *,
        encoder: _Program | None = None,
    ) -> None:
        self._program = program
        self._encoder = encoder
        self._sites = sites
        self._adapters: dict[Parameter, list[TorchMatrices | None]] = {
            weight: [None] * program.bounds.limits.num_adapter_slots for weight in sites.weights
        }
        self._weights = weights
        self._kv = kv
        self._bounds = program.bounds
        self._device = next(iter(weights.values())).device

    @property
    def limits(self) -> Limits:
        return self._bounds.limits

    @property
    def block_size(self) -> int:
        return self._bounds.block_size

    @property
    def vocab_size(self) -> int:
        return self._bounds.vocab_size

    @property
    def source_vocab_size(self) -> int:
        assert self._encoder is not None, "the model has no encoder"
        return self._encoder.bounds.vocab_size

    @property
    def block_bytes(self) -> int:
        return sum(2 * layer.keys[: self.block_size].nbytes for layer in self._kv.values())

    @property
    def is_pool_on_host(self) -> bool:
        return self._device.type == "cpu"

    def run(self, batch: Batch) -> StepResult:
        outputs = self._interpret(self._program, batch)
        if batch.sampling is None:
            return StepResult(outputs=outputs)
        sampled = sample(outputs["logits"], batch.sampling)
        return StepResult(
            outputs=outputs,
            token_ids=sampled.token_ids,
            is_valid=sampled.is_valid,
            logprobs=sampled.logprobs,
            top_token_ids=sampled.top_token_ids,
            top_logprobs=sampled.top_logprobs,
        )

    def set_adapter(self, slot: int, matrices: Mapping[str, LowRankMatrices] | None) -> None:
        for weight, placed in self._sites.place(slot, matrices or {}).items():
            self._adapters[weight][slot] = None if placed is None else self._to_torch(placed)

    def encode(self, batch: Batch) -> None:
        assert self._encoder is not None, "the model has no encoder"
        self._interpret(self._encoder, batch)

    @torch.no_grad()
    def _interpret(self, program: _Program, batch: Batch) -> dict[str, Float32Array]:
        """The outputs of a step."""
        program.bounds.check(batch)
        try:
            step = Step.from_batch(
                batch,
                weights=self._weights,
                kv=self._kv,
                block_size=self.block_size,
                device=self._device,
                adapters=self._adapters,
            )
            graph = program.graph_for(batch)
            for node in graph.nodes:
                OPS[type(node)](node, step)
            outputs = graph.outputs
            return {name: step.values[value].cpu().numpy() for name, value in outputs.items()}
        except torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from error

    def read_block(self, block: int, out: UInt8Array) -> None:
        self._check_size("out", out)
        np.copyto(out, torch.cat(self._parts(block)).cpu().numpy())

    def write_block(self, block: int, data: UInt8Array) -> None:
        self._check_size("data", data)
        parts = self._parts(block)
        stored = torch.split_with_sizes(
            torch.tensor(data, device=self._device), [len(part) for part in parts]
        )
        for part, bytes_of_part in zip(parts, stored, strict=True):
            part.copy_(bytes_of_part)

    def copy_block(self, source: int, target: int) -> None:
        for part, copy in zip(self._parts(source), self._parts(target), strict=True):
            copy.copy_(part)

    def _to_torch(self, placed: PlacedMatrices) -> TorchMatrices:
        def to_torch(array: Float32Array) -> torch.Tensor:
            return torch.tensor(array, device=self._device)

        return TorchMatrices(
            to_torch(placed.down),
            tuple(
                AddedRows(
                    part.first_row,
                    part.first_rank,
                    to_torch(part.up),
                    None if part.factors is None else to_torch(part.factors),
                    None if part.shifts is None else to_torch(part.shifts),
                )
                for part in placed.parts
            ),
        )

    def _parts(self, block: int) -> list[torch.Tensor]:
        """The bytes of a block: keys, values, keys, ... layer by layer. Views."""
        if not 0 <= block < self.limits.num_blocks:
            raise ValueError(f"block is {block}; the limits are 0 and {self.limits.num_blocks - 1}")
        return [part for layer in self._kv.values() for part in layer.block(block, self.block_size)]

    def _check_size(self, name: str, array: UInt8Array) -> None:
        if array.shape != (self.block_bytes,):
            raise ValueError(f"{name} has {array.size} bytes; a block has {self.block_bytes}")


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # unknown, not built in, or not in this machine
        reason = str(error).partition("\n")[0]
        raise OptionError(
            f"device={device!r} does not work: {reason}",
            hint="choose cpu, or a device that this PyTorch and this machine have",
        ) from error


def _to_tensor(parameter: Parameter, parameters: Mapping[str, Float32Array], device: str) -> torch.Tensor:
    parts = [np.asarray(parameters[name], dtype=np.float32) for name in parameter.names]
    tensor = torch.tensor(np.concatenate(parts), device=device)
    assert tuple(tensor.shape) == parameter.shape, f"{parameter} got {tuple(tensor.shape)}"
    return tensor
