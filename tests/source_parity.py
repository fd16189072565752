"""Running an encoder-decoder as plainly as it can be, as `parity` runs models of one graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.graph.node import Graph
from fastserve.graph.passes import optimize
from fastserve.models.family import arrange_tensors, build_graph, build_source_encoder, read_config
from fastserve.models.parameters import check_parameters, expected_parameters
from fastserve.types import NO_ADAPTER, Batch, Float32Array, Int32Array, Limits, SourceExecutable
from parity import BACKENDS

MAX_SOURCES = 4


@dataclass(frozen=True)
class Graphs:
    encoder: Graph
    decoder: Graph
    parameters: dict[str, Float32Array]


def load_graphs(path: Path) -> Graphs:
    """The graphs and the float32 parameters of a model on disk."""
    checkpoint = open_checkpoint(path)
    config = read_config(checkpoint.config)
    tensors = arrange_tensors(config, checkpoint.tensors)
    encoder, decoder = build_source_encoder(config, tensors), build_graph(config, tensors)
    assert encoder is not None
    both = decoder.beside(encoder)
    assert check_parameters(both, tensors) == ()
    return Graphs(encoder, decoder, {name: to_f32(tensors[name]) for name in expected_parameters(both)})


def compile_graphs(
    backend: str,
    graphs: Graphs,
    *,
    kv_dtype: str = "f32",
    max_context: int = 128,
    num_adapter_slots: int = 0,
    **options: Any,
) -> SourceExecutable:
    limits = Limits(
        max_tokens=2 * max_context,
        max_outputs=2 * max_context,
        max_sequences=MAX_SOURCES,
        num_blocks=2 * MAX_SOURCES * max_context // 32,
        max_context=max_context,
        num_adapter_slots=num_adapter_slots,
        max_adapter_rank=8,
    )
    executable = BACKENDS[backend](
        optimize(graphs.decoder),
        graphs.parameters,
        limits=limits,
        kv_dtype=kv_dtype,
        encoder=optimize(graphs.encoder),
        **options,
    )
    assert isinstance(executable, SourceExecutable)
    return executable


@dataclass
class Target:
    """What follows a source, token by token. Several that share a pool need different places."""

    executable: SourceExecutable
    source_ids: Sequence[int]
    place: int = 0
    adapter_slot: int = NO_ADAPTER
    token_ids: list[int] = field(default_factory=list)

    def step(self, new_ids: Sequence[int]) -> Float32Array:
        """Append tokens; their logits [len(new_ids), vocab]."""
        return step_targets([(self, new_ids)])[0]

    def table(self, *, of_source: bool) -> list[int]:
        """Blocks dealt turn about, so that no table is contiguous."""
        columns = range(self.executable.limits.max_context // 32)
        return [(column * MAX_SOURCES + self.place) * 2 + of_source for column in columns]


def encode_sources(targets: Sequence[Target]) -> None:
    """All of them in one batch."""
    lengths = [len(target.source_ids) for target in targets]
    targets[0].executable.encode(
        Batch(
            token_ids=_int32([token_id for target in targets for token_id in target.source_ids]),
            positions=_int32([position for length in lengths for position in range(length)]),
            sequence_starts=np.cumsum([0, *lengths]).astype(np.int32),
            context_lengths=_int32(lengths),
            block_tables=_int32([target.table(of_source=True) for target in targets]),
            output_rows=_int32([]),
            adapter_slots=_int32([target.adapter_slot for target in targets]),
        )
    )


def step_targets(turns: Sequence[tuple[Target, Sequence[int]]]) -> list[Float32Array]:
    """Append tokens to several targets in one batch; the logits [new tokens, vocab] of each."""
    starts = np.cumsum([0, *(len(new_ids) for _, new_ids in turns)]).astype(np.int32)
    contexts = [(len(t.token_ids), len(t.token_ids) + len(new_ids)) for t, new_ids in turns]
    batch = Batch(
        token_ids=_int32([token_id for _, new_ids in turns for token_id in new_ids]),
        positions=_int32([position for context in contexts for position in range(*context)]),
        sequence_starts=starts,
        context_lengths=_int32([stop for _, stop in contexts]),
        block_tables=_int32([target.table(of_source=False) for target, _ in turns]),
        output_rows=_int32(range(starts[-1])),
        source_lengths=_int32([len(target.source_ids) for target, _ in turns]),
        source_block_tables=_int32([target.table(of_source=True) for target, _ in turns]),
        adapter_slots=_int32([target.adapter_slot for target, _ in turns]),
    )
    for target, new_ids in turns:
        target.token_ids += new_ids
    logits = turns[0][0].executable.run(batch).outputs["logits"].copy()
    return np.split(logits, starts[1:-1])


def run_target(
    executable: SourceExecutable,
    source_ids: Sequence[int],
    target_ids: Sequence[int],
    chunk: int = 1000,
    adapter_slot: int = NO_ADAPTER,
) -> Float32Array:
    """Logits [target tokens, vocab], of the target in chunks."""
    target = Target(executable, source_ids, adapter_slot=adapter_slot)
    encode_sources([target])
    starts = range(0, len(target_ids), chunk)
    return np.concatenate([target.step(target_ids[start : start + chunk]) for start in starts])


def run_greedy_target(
    executable: SourceExecutable, source_ids: Sequence[int], start_id: int, num_tokens: int
) -> list[int]:
    """The `num_tokens` most probable tokens after the start."""
    target = Target(executable, source_ids)
    encode_sources([target])
    new_ids = [start_id]
    for _ in range(num_tokens):
        new_ids = [int(target.step(new_ids)[-1].argmax())]
    return [*target.token_ids[1:], *new_ids]


def _int32(numbers: Sequence[int] | Sequence[Sequence[int]] | range) -> Int32Array:
    return np.asarray(numbers, dtype=np.int32)
