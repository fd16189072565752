"""Running a backend as plainly as it can be, to compare what it computes with something else.

Tests are written against these helpers and a backend's name, so that every backend passes the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.graph.node import Graph
from fastserve.graph.passes import optimize
from fastserve.models.config import DecoderConfig
from fastserve.models.family import arrange_tensors, build_graph, read_config
from fastserve.models.parameters import check_parameters, expected_parameters
from fastserve.models.pooling import Pooling
from fastserve.types import Batch, Executable, Float32Array, Limits

RANGE_BOUND = 2e-5  # of the expected output's range; what float32 weights and float32 KV must keep

MAX_PLACES = 4  # sequences that can share a pool

Compile = Callable[..., Executable]


def compile_torch(graph: Graph, parameters: Mapping[str, Float32Array], **options: Any) -> Executable:
    from fastserve.backends.torch.executable import compile_torch

    return compile_torch(graph, parameters, **options)


def compile_native(
    graph: Graph, parameters: Mapping[str, Float32Array], *, weights: str = "f32", **options: Any
) -> Executable:
    from fastserve.backends.native.executable import compile_native

    return compile_native(graph, store_f32(parameters), weights=weights, **options)  # type: ignore[arg-type]


def store_f32(parameters: Mapping[str, Float32Array]) -> dict[str, StoredTensor]:
    """Parameters as a checkpoint would hold them in float32."""
    return {
        name: StoredTensor(
            name, TensorFormat.F32, array.shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        )
        for name, array in parameters.items()
    }


# (graph, parameters by name, *, limits, kv_dtype) -> Executable, by the backend's name
BACKENDS: dict[str, Compile] = {"torch": compile_torch, "native": compile_native}


def compile_graph(
    backend: str,
    graph: Graph,
    parameters: Mapping[str, Float32Array],
    *,
    kv_dtype: str = "f32",
    max_context: int = 512,
) -> Executable:
    """Optimize the graph and compile it for a backend, with room for a few sequences."""
    limits = Limits(
        max_tokens=max_context,
        max_outputs=max_context,
        max_sequences=MAX_PLACES,
        num_blocks=MAX_PLACES * max_context // 32,
        max_context=max_context,
    )
    return BACKENDS[backend](optimize(graph), parameters, limits=limits, kv_dtype=kv_dtype)


def load_model(path: Path, *, context_length: int | None = None) -> tuple[Graph, dict[str, Float32Array]]:
    """The graph and the float32 parameters of a model on disk; of a decoder, for texts of up to so many
    tokens."""
    checkpoint = open_checkpoint(path)
    config = read_config(checkpoint.config)
    tensors = arrange_tensors(config, checkpoint.tensors)
    if isinstance(config, DecoderConfig):
        config = config.for_context(context_length or config.usual_context)
    sentence = checkpoint.sentence
    pooling = Pooling.from_sentence_transformers(sentence.modules, sentence.pooling) if sentence else None
    graph = build_graph(config, tensors, ending=pooling)
    check_parameters(graph, tensors)
    return graph, {name: to_f32(tensors[name]) for name in expected_parameters(graph)}


@dataclass
class Run:
    """One sequence on its way through an executable. Runs that share a pool need different `place`s."""

    executable: Executable
    place: int = 0
    token_ids: list[int] = field(default_factory=list)

    def step(self, new_ids: Sequence[int]) -> Float32Array:
        """Append tokens; their logits [len(new_ids), vocab]."""
        return step_together([(self, new_ids)])[0]


def step_together(turns: Sequence[tuple[Run, Sequence[int]]]) -> list[Float32Array]:
    """Append tokens to several runs in one batch; the logits [new tokens, vocab] of each."""
    executable = turns[0][0].executable
    batch = make_batch(turns)
    for run, new_ids in turns:
        run.token_ids += new_ids
    logits = executable.run(batch).outputs["logits"].copy()
    return np.split(logits, batch.sequence_starts[1:-1])


def make_batch(turns: Sequence[tuple[Run, Sequence[int]]]) -> Batch:
    """The batch that appends new tokens to runs, with every row an output row."""
    executable = turns[0][0].executable
    starts = np.cumsum([0, *(len(new_ids) for _, new_ids in turns)]).astype(np.int32)
    contexts = [(len(run.token_ids), len(run.token_ids) + len(new_ids)) for run, new_ids in turns]
    num_columns = -(-max(stop for _, stop in contexts) // executable.block_size)
    return Batch(
        token_ids=_int32([token for _, new_ids in turns for token in new_ids]),
        positions=_int32([position for context in contexts for position in range(*context)]),
        sequence_starts=starts,
        context_lengths=_int32([stop for _, stop in contexts]),
        block_tables=_int32([_block_table(executable, run.place, num_columns) for run, _ in turns]),
        output_rows=_int32(range(starts[-1])),
    )


def _block_table(executable: Executable, place: int, num_columns: int) -> list[int]:
    """Blocks dealt from the pool's end, turn about, so that no table is contiguous or in order by luck."""
    last = executable.limits.num_blocks - 1
    return [last - (column * MAX_PLACES + place) for column in range(num_columns)]


def run_logits(executable: Executable, token_ids: Sequence[int], *, chunk: int | None = None) -> Float32Array:
    """Logits [tokens, vocab] of a prompt run in chunks, or in one go."""
    run, size = Run(executable), chunk or len(token_ids)
    return np.concatenate([run.step(token_ids[i : i + size]) for i in range(0, len(token_ids), size)])


def run_embeddings(
    executable: Executable,
    texts: Sequence[Sequence[int]],
    *,
    token_types: Sequence[Sequence[int]] | None = None,
) -> Float32Array:
    """Embeddings [texts, width] of encoder inputs that share one batch."""
    batch = make_batch([(Run(executable, place), ids) for place, ids in enumerate(texts)])
    if token_types is not None:
        batch = replace(batch, token_types=_int32([kind for kinds in token_types for kind in kinds]))
    return executable.run(batch).outputs["embedding"].copy()


def run_greedy(executable: Executable, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The `num_tokens` most probable tokens after a prompt."""
    run, completion = Run(executable), []
    new_ids = list(prompt)
    for _ in range(num_tokens):
        new_ids = [int(run.step(new_ids)[-1].argmax())]
        completion += new_ids
    return completion


def range_error(actual: Float32Array, expected: Float32Array) -> float:
    """The largest difference as a share of the expected range."""
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.ptp(expected))


def _int32(numbers: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.asarray(numbers, dtype=np.int32)
