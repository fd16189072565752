"""Compiling a graph for the CPU: weights packed, memory planned, nodes lowered to one plan; running steps."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import fastserve._native as _native
from fastserve.backends.bounds import BatchBounds
from fastserve.backends.native.adapters import NativeAdapters
from fastserve.backends.native.fuse_quantize_rows import QuantizedResult
from fastserve.backends.native.fuse_rope_attention import RopeAttention
from fastserve.backends.native.layout import Layout, lay_out
from fastserve.backends.native.lower import Lowering, lower, make_bias_table, make_rope_table
from fastserve.backends.native.packed_cache import PackedCache
from fastserve.backends.native.storage_choice import StorageChoice
from fastserve.backends.native.weight_scheme import choose_schemes
from fastserve.backends.native.weights import Weights
from fastserve.checkpoint.tensor import StoredTensor
from fastserve.config import KvDtype, WeightFormat
from fastserve.errors import OptionError, UnsupportedError
from fastserve.graph.node import Attention, Graph, Node, PoolNode, Rope, Rows, StoreSource
from fastserve.option import check_choice, check_integer
from fastserve.types import NO_ADAPTER, Batch, Limits, LowRankMatrices, StepResult, UInt8Array

logger = logging.getLogger(__name__)

_MAX_THREADS_PER_CORE = 4
_MIN_THREAD_LIMIT = 64


def compile_native(
    graph: Graph,
    tensors: Mapping[str, StoredTensor],
    *,
    weights: WeightFormat = "int8",
    limits: Limits,
    kv_dtype: KvDtype = "f16",
    threads: int | None = None,
    isa: str | None = None,
    cache: PackedCache | None = None,
    storage_choice: StorageChoice | None = None,
    in_strips: bool = True,
    encoder: Graph | None = None,
) -> NativeExecutable:
    """Compile an optimized graph for this CPU; of a decoder that reads sources, with that of its `encoder`.

    `tensors` holds every tensor that the graphs name, in the graphs' shapes (see
    `fastserve.models.parameters.check_parameters`), in any stored format; matrices are packed as `weights`
    (see `fastserve.backends.native.weight_scheme`).
    `threads` is by default one for each core that this process may use. `isa` forces an instruction set
    (default: the environment's FASTSERVE_ISA, else the best that the CPU has). `cache` keeps packed matrices
    from one start to the next. `storage_choice` says how sparse matrices are stored where that is to be
    chosen; without it they are dense. `in_strips=False` takes all rows through one call after the other, as
    calls are measured alone.

    Raises:
        OptionError: an unknown format or instruction set, or one that this CPU lacks; `threads` below 1
            or above `max_threads()`, or more than the system lets this process start.
        UnsupportedError: a shape that the kernels do not have.
    """
    check_choice("weights", weights, get_args(WeightFormat))
    schemes = choose_schemes(graph.beside(encoder) if encoder else graph, weights, tensors)
    return compile_layout(
        lay_out(graph, schemes, limits, in_strips=in_strips),
        tensors,
        limits=limits,
        kv_dtype=kv_dtype,
        threads=threads,
        isa=isa,
        cache=cache,
        storage_choice=storage_choice,
        encoder=lay_out(encoder, schemes, limits, in_strips=in_strips) if encoder else None,
    )


def compile_layout(
    layout: Layout,
    tensors: Mapping[str, StoredTensor],
    *,
    limits: Limits,
    kv_dtype: KvDtype = "f16",
    threads: int | None = None,
    isa: str | None = None,
    cache: PackedCache | None = None,
    storage_choice: StorageChoice | None = None,
    encoder: Layout | None = None,
) -> NativeExecutable:
    """Compile what is laid out for steps of these limits. Arguments and errors as of `compile_native`."""
    assert layout.is_for(limits)
    assert encoder is None or (encoder.is_for(limits) and encoder.schemes == layout.schemes)
    check_choice("kv_dtype", kv_dtype, get_args(KvDtype))
    runtime = make_runtime(threads, isa)
    packed = Weights(runtime, tensors, layout.schemes, cache, storage_choice)
    nodes = [*_ops(layout), *(_ops(encoder) if encoder else ())]
    kv_pool = _make_kv_pool([node for node in nodes if isinstance(node, PoolNode)], limits, kv_dtype)
    adapters = None
    if layout.adapted is not None:
        graph = layout.source.beside(encoder.source) if encoder else layout.source
        adapters = NativeAdapters(runtime, graph, tensors, layout.schemes, limits)
    shared = _Shared(runtime, packed, kv_pool, limits)
    decoder = _make_program(layout, shared, adapters)
    encoder_program = _make_program(encoder, shared, adapters) if encoder else None
    packed.keep()
    storages = packed.storages()
    if storages.keys() - {"dense"}:
        counts = ", ".join(f"{count} {storage}" for storage, count in sorted(storages.items()))
        logger.info("matrices by storage: %s", counts)
    return NativeExecutable(runtime, kv_pool, decoder, adapters=adapters, encoder=encoder_program)


@dataclass(frozen=True, slots=True)
class _Shared:
    """What the plans of one executable have in common."""

    runtime: _native.Runtime
    weights: Weights
    kv_pool: _native.KvPool
    limits: Limits


@dataclass(frozen=True, slots=True)
class CompiledPlan:
    """A plan, what its batches may hold, and where the graph's outputs lie in its arena."""

    plan: _native.Plan
    bounds: BatchBounds
    outputs: Mapping[str, _native.Matrix]
    rows_of: Mapping[str, Rows]


@dataclass(frozen=True, slots=True)
class _Program:
    """The plans of one graph: for steps without adapters, and for those that have some."""

    plain: CompiledPlan
    adapted: CompiledPlan | None  # None: there never are any

    def plan_for(self, batch: Batch) -> CompiledPlan:
        slots = batch.adapter_slots
        if self.adapted is not None and slots is not None and (slots != NO_ADAPTER).any():
            return self.adapted
        return self.plain

    @property
    def plans(self) -> list[_native.Plan]:
        return [one.plan for one in (self.plain, self.adapted) if one is not None]


def _make_program(layout: Layout, shared: _Shared, adapters: NativeAdapters | None) -> _Program:
    adapted = None
    if layout.adapted is not None and adapters is not None:
        adapted = _make_plan(layout.adapted, shared, adapters)
    return _Program(_make_plan(layout, shared), adapted)


def _make_plan(layout: Layout, shared: _Shared, adapters: NativeAdapters | None = None) -> CompiledPlan:
    limits = shared.limits
    bounds = BatchBounds.from_graph(layout.source, limits, _native.BLOCK_SIZE)
    plan = _native.Plan(
        shared.runtime,
        layout.memory.size_bytes,
        max_tokens=limits.max_tokens,
        max_outputs=limits.max_outputs,
        max_sequences=limits.max_sequences,
        num_blocks=limits.num_blocks,
        max_context=bounds.num_positions,
        vocab_size=bounds.vocab_size,
        num_token_types=bounds.num_token_types,
        needs_whole_sequences=bounds.needs_whole_sequences,
    )
    ops = _ops(layout)
    tables = {op.table for op in ops if isinstance(op, Rope | RopeAttention)}
    biases = {op.bias for op in ops if isinstance(op, Attention) and op.bias}
    lowering = Lowering(
        plan,
        layout.memory,
        shared.weights,
        shared.kv_pool,
        {t: make_rope_table(t, bounds.num_positions) for t in tables},
        {b: make_bias_table(b, shared.weights, bounds.num_positions) for b in biases},
        layout.chains,
        {} if adapters is None else adapters.tables,
    )
    lower(layout.graph, lowering)
    outputs = {name: lowering.matrix(value) for name, value in layout.graph.outputs.items()}
    rows_of = {name: value.rows for name, value in layout.graph.outputs.items()}
    return CompiledPlan(plan, bounds, outputs, rows_of)


def _ops(layout: Layout) -> list[Node]:
    return [node.producer if isinstance(node, QuantizedResult) else node for node in layout.graph.nodes]


@dataclass(frozen=True, slots=True)
class CallProfile:
    """What one call of the plan did over all runs: at the least so many bytes of memory and operations."""

    op: str
    shape: str  # of a linear: outputs x inputs, and how its weights are stored where they are not dense
    runs: int
    seconds: float
    bytes: int
    operations: int


class NativeExecutable:
    """Implements `fastserve.types.Executable`, and with an encoder `SourceExecutable`, on the CPU. Made by
    `compile_native`.

    A run that samples uses the logits as scratch: its result has no "logits".
    """

    def __init__(
        self,
        runtime: _native.Runtime,
        kv_pool: _native.KvPool,
        program: _Program,
        *,
        adapters: NativeAdapters | None = None,
        encoder: _Program | None = None,
    ) -> None:
        self._runtime = runtime
        self._kv_pool = kv_pool
        self._bounds = program.plain.bounds
        self._program = program
        self._adapters = adapters
        self._encoder = encoder

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
        return self._encoder.plain.bounds.vocab_size

    @property
    def block_bytes(self) -> int:
        return self._kv_pool.block_bytes

    @property
    def is_pool_on_host(self) -> bool:
        return True

    @property
    def isa(self) -> str:
        """The instruction set whose kernels run."""
        return self._runtime.isa

    @property
    def num_threads(self) -> int:
        return self._runtime.num_threads

    @contextmanager
    def profiling(self) -> Iterator[list[CallProfile]]:
        """Profile the runs within the context; the list is filled when it ends."""
        calls: list[CallProfile] = []
        plans = [*(self._encoder.plans if self._encoder else ()), *self._program.plans]
        for plan in plans:
            plan.start_profile()
        try:
            yield calls
        finally:
            for plan in plans:
                plan.stop_profile()
                calls += (CallProfile(*row) for row in plan.profile())

    def run(self, batch: Batch) -> StepResult:
        compiled = self._program.plan_for(batch)
        try:
            sampled = compiled.plan.run(batch, compiled.outputs.get("logits"))
        except ValueError as error:
            raise OptionError(str(error)) from error
        num_rows = {
            Rows.TOKENS: batch.num_tokens,
            Rows.OUTPUTS: len(batch.output_rows),
            Rows.SEQUENCES: batch.num_sequences,
        }
        outputs = {
            name: compiled.plan.view(matrix, num_rows[compiled.rows_of[name]])
            for name, matrix in compiled.outputs.items()
            if sampled is None or name != "logits"
        }
        if sampled is None:
            return StepResult(outputs=outputs)
        is_valid, token_ids, logprobs, top_token_ids, top_logprobs = sampled
        return StepResult(
            outputs=outputs,
            token_ids=token_ids,
            is_valid=is_valid,
            logprobs=logprobs,
            top_token_ids=top_token_ids,
            top_logprobs=top_logprobs,
        )

    def set_adapter(self, slot: int, matrices: Mapping[str, LowRankMatrices] | None) -> None:
        if self._adapters is None:
            raise OptionError(f"the adapter slot {slot} is one too many: there are none")
        self._adapters.set(slot, matrices)

    def encode(self, batch: Batch) -> None:
        assert self._encoder is not None, "the model has no encoder"
        try:
            self._encoder.plan_for(batch).plan.run(batch, None)
        except ValueError as error:
            raise OptionError(str(error)) from error

    def read_block(self, block: int, out: UInt8Array) -> None:
        self._kv_pool.read_block(block, out)

    def write_block(self, block: int, data: UInt8Array) -> None:
        self._kv_pool.write_block(block, data)

    def copy_block(self, source: int, target: int) -> None:
        self._kv_pool.copy_block(source, target)


def make_runtime(threads: int | None = None, isa: str | None = None) -> _native.Runtime:
    """The thread pool and kernels to run with; options as for `compile_native`."""
    if threads is not None:
        check_integer("threads", threads, low=1, high=max_threads())
    name = isa if isa is not None else os.environ.get("FASTSERVE_ISA", "")
    try:
        return _native.Runtime(threads or 0, name)
    except ValueError as error:
        hint = f"runnable here: {', '.join(runnable_isas())}"
        raise OptionError(str(error), hint=hint) from error
    except RuntimeError as error:
        wanted = threads or _native.count_cores().num_threads
        raise OptionError(
            f"threads={wanted} could not be started: {error}",
            hint="choose fewer threads, or raise the limits of processes and memory (ulimit -u, ulimit -v)",
        ) from error


def max_threads() -> int:
    """Most threads of one executable. More than the cores only wait for each other; some are let through for
    machines whose cores we miscount."""
    return max(_MIN_THREAD_LIMIT, _MAX_THREADS_PER_CORE * _native.count_cores().num_cpus)


def runnable_isas() -> list[str]:
    """The instruction sets that this CPU runs, best first."""
    return _native.runnable_isas()


def _make_kv_pool(nodes: Sequence[PoolNode], limits: Limits, kv_dtype: KvDtype) -> _native.KvPool:
    if not nodes:
        return _native.KvPool(0, limits.num_blocks, num_kv_heads=1, head_dim=1, format=kv_dtype)
    attentions = [node for node in nodes if not isinstance(node, StoreSource)]
    heads = {(node.num_heads, node.num_kv_heads, node.head_dim) for node in attentions}
    if len(heads) > 1:
        raise UnsupportedError(f"layers with different heads {sorted(heads)} are not supported")
    num_kv_heads, head_dim = nodes[0].num_kv_heads, nodes[0].head_dim
    if head_dim > _native.MAX_HEAD_DIM:
        raise UnsupportedError(
            f"heads of {head_dim} dimensions are not supported; the limit is {_native.MAX_HEAD_DIM}"
        )
    num_layers = 1 + max(node.pool_layer for node in nodes)
    return _native.KvPool(num_layers, limits.num_blocks, num_kv_heads, head_dim, kv_dtype)
