"""How fast single kernels are in the shapes of whole models, against the limits measured in the same run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastserve.backends.native.executable import (
    CallProfile,
    NativeExecutable,
    compile_native,
    make_runtime,
)
from fastserve.backends.native.storage_speed import measure_speeds
from fastserve.backends.native.weight_scheme import SCHEMES
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.config import WeightFormat
from fastserve.evaluate.machine import MIB, MachineLimits, check_share, measure_limits
from fastserve.evaluate.profile import LINEARS, OpProfile, group_calls
from fastserve.evaluate.random_model import shape_config, shape_graph
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Graph, Linear
from fastserve.graph.passes import optimize
from fastserve.models.family import build_graph, read_config
from fastserve.models.parameters import expected_parameters
from fastserve.types import Batch, Limits

ROWS = (1, 8, 32, 128, 512)
WORKING_SET = 64 * MIB  # of a shape's weights: as many copies, so that none stays in a core's own cache
ZEROS_OF_SPARSE = (0.5, 0.8, 0.9, 0.95)
ROWS_OF_SPARSE = (1, 8, 64)
_VOCAB_SIZE = 64
_BLOCK_SIZE = 32
_ELEMENT_BITS = {"f32": 32, "f16": 16, "bf16": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpeed:
    """The fastest of some runs of one kernel. Shares are of the limits: of reading for the weights, of int8
    operations (f32 for formats that are not integers) for the arithmetic."""

    op: str
    shape: str
    weights: str
    rows: int
    seconds: float
    bytes_per_second: float
    operations_per_second: float
    share_of_read: float
    share_of_operations: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def linear_shapes(shape: str) -> list[tuple[int, int]]:
    """[outputs, inputs] of every linear that a model of that shape has, once each, in order.

    Raises:
        OptionError: there is no such shape.
    """
    linears = [node for node in optimize(shape_graph(shape)).nodes if isinstance(node, Linear)]
    return list(dict.fromkeys((node.out.width, node.x.width) for node in linears))


def measure_linears(
    shapes: Sequence[tuple[int, int]],
    formats: Sequence[WeightFormat],
    *,
    rows: Sequence[int] = ROWS,
    threads: int | None = None,
    repeats: int = 3,
) -> tuple[MachineLimits, list[KernelSpeed]]:
    """Every shape in every format at every number of rows, and the limits: the best of many measurements
    between those of the kernels.

    Raises:
        OptionError: `threads` is out of range.
        MeasurementError: a share of a limit is above 1.
    """
    limits = measure_limits(threads, working_set_bytes=WORKING_SET)
    fastest: list[tuple[OpProfile, str, int]] = []
    for outputs, inputs in shapes:
        for weights in formats:
            executable = _compile_linears(outputs, inputs, weights, limits.threads, max(rows))
            for num_rows in rows:
                batch = make_batch(num_rows, num_rows)
                profiles = [_profile(executable, batch, "linear") for _ in range(repeats)]
                fastest.append((min(profiles, key=lambda p: p.seconds), weights, num_rows))
            again = measure_limits(threads, working_set_bytes=WORKING_SET, seconds=0.1)
            limits = limits.at_least(again)
    return limits, [_to_speed(profile, weights, num_rows, limits) for profile, weights, num_rows in fastest]


def measure_ops(
    shape: str, limits: MachineLimits, *, context_length: int = 2048, num_rows: int = 512, repeats: int = 3
) -> list[KernelSpeed]:
    """Every op but plain linears, in two layers of that shape: for one row at the end of a context, and for a
    prompt of `num_rows`. Their data may come from a cache: shares of reading may be above 1.

    Raises:
        OptionError: there is no such shape.
    """
    config = {**shape_config(shape), "num_hidden_layers": 2, "vocab_size": _VOCAB_SIZE}
    model = read_config(config)
    graph = build_graph(model)
    tensors = {name: _random_tensor(name, size) for name, size in expected_parameters(graph).items()}
    is_causal = config["model_type"] == "llama"
    length = min(context_length, model.max_context)
    executable = compile_native(
        optimize(graph),
        tensors,
        weights="int8",
        limits=_limits(max(num_rows, length), length),
        threads=limits.threads,
    )
    speeds = []
    for batch in [make_batch(num_rows, num_rows)] + ([make_batch(1, length)] if is_causal else []):
        runs = [group_calls(_calls(executable, batch)) for _ in range(repeats)]
        for profiles in zip(*(sorted(run, key=lambda p: (p.op, p.shape)) for run in runs), strict=True):
            fastest = min(profiles, key=lambda p: p.seconds)
            if fastest.op not in ("linear", "sample"):
                weights = "int8" if fastest.op in LINEARS else ""
                speeds.append(_to_speed(fastest, weights, batch.num_tokens, limits))
    return speeds


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseSpeed:
    """How many times faster than with dense weights a linear is that keeps only values other than zero."""

    op: str
    weights: str
    zeros: float
    storage: str
    rows: int
    times_dense: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_sparse(formats: Sequence[WeightFormat], *, threads: int | None = None) -> list[SparseSpeed]:
    """Linears of every format that can be sparse, by share of zeros, storage and rows, from memory.

    Raises:
        OptionError: `threads` is out of range.
    """
    runtime = make_runtime(threads)
    schemes = {name: SCHEMES[name] for name in formats if name != "stored"}
    return [
        SparseSpeed(op="linear", weights=name, zeros=zeros, storage=storage, rows=rows, times_dense=speed)
        for name, scheme in schemes.items()
        if scheme.is_integer and scheme.offset == "none"
        for zeros in ZEROS_OF_SPARSE
        for storage, by_rows in measure_speeds(runtime, scheme, zeros, ROWS_OF_SPARSE).items()
        for rows, speed in by_rows.items()
    ]


def make_batch(num_rows: int, context_length: int) -> Batch:
    """The last rows of one sequence."""
    num_blocks = -(-context_length // _BLOCK_SIZE)
    return Batch(
        token_ids=np.arange(num_rows, dtype=np.int32) % _VOCAB_SIZE,
        positions=np.arange(context_length - num_rows, context_length, dtype=np.int32),
        sequence_starts=np.asarray([0, num_rows], np.int32),
        context_lengths=np.asarray([context_length], np.int32),
        block_tables=np.arange(num_blocks, dtype=np.int32)[None],
        output_rows=np.asarray([num_rows - 1], np.int32),
    )


def _compile_linears(
    outputs: int, inputs: int, weights: WeightFormat, threads: int, max_rows: int
) -> NativeExecutable:
    """As many copies of one linear as fill the working set, all reading the same rows."""
    tensors = {"embedding": _random_tensor("embedding", (_VOCAB_SIZE, inputs))}
    source = _random_tensor("linear", (outputs, inputs))
    weight_bytes = outputs * inputs * _ELEMENT_BITS[weights.partition(":")[0]] // 8
    num_copies = -(-WORKING_SET // weight_bytes)
    b = GraphBuilder()
    x = b.embedding("token_ids", "embedding", size=_VOCAB_SIZE, width=inputs)
    for copy in range(num_copies):
        tensors[f"linear.{copy}"] = source
        y = b.linear(x, f"linear.{copy}", width=outputs)
    graph: Graph = b.finish(y=y)
    return compile_native(
        graph,
        tensors,
        weights=weights,
        limits=_limits(max_rows, max_rows),
        threads=threads,
        in_strips=False,  # of many linears side by side, which no model has
    )


def _limits(max_tokens: int, max_context: int) -> Limits:
    num_blocks = -(-max_context // _BLOCK_SIZE)
    return Limits(
        max_tokens=max_tokens, max_outputs=1, max_sequences=1, num_blocks=num_blocks, max_context=max_context
    )


def _random_tensor(name: str, shape: tuple[int, ...]) -> StoredTensor:
    values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32) / np.float32(shape[-1] ** 0.5)
    return StoredTensor(name, TensorFormat.F32, shape, values.reshape(-1).view(np.uint8))


def _calls(executable: NativeExecutable, batch: Batch) -> list[CallProfile]:
    with executable.profiling() as calls:
        executable.run(batch)
    return calls


def _profile(executable: NativeExecutable, batch: Batch, op: str) -> OpProfile:
    (profile,) = (profile for profile in group_calls(_calls(executable, batch)) if profile.op == op)
    return profile


def _to_speed(profile: OpProfile, weights: str, rows: int, limits: MachineLimits) -> KernelSpeed:
    is_integer = weights.startswith(("int", "stored"))
    peak = limits.int8_operations_per_second if is_integer else limits.f32_operations_per_second
    share_of_read = profile.bytes_per_second / limits.read_bytes_per_second
    share_of_operations = profile.operations_per_second / peak
    if weights:
        what = f"{profile.op} {profile.shape} {weights} of {rows} rows"
        check_share(what, share_of_read)
        check_share(what, share_of_operations)
    return KernelSpeed(
        op=profile.op,
        shape=profile.shape,
        weights=weights,
        rows=rows,
        seconds=profile.seconds / profile.runs,
        bytes_per_second=profile.bytes_per_second,
        operations_per_second=profile.operations_per_second,
        share_of_read=share_of_read,
        share_of_operations=share_of_operations,
    )
