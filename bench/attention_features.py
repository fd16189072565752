"""What windows, caps of scores and bias of distances cost attention, or spare it: the processor time of one
thread over that of attention without them, in interleaved rounds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from fastserve.backends.native.executable import NativeExecutable, compile_native
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.evaluate.estimate import estimate_ratio
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Parameter, RelativeBias
from fastserve.types import Batch, Limits
from report import make_parser, publish

VOCAB_SIZE, NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 64, 6, 9, 3, 64
CONTEXT = 4096
LIMITS = Limits(
    max_tokens=CONTEXT, max_outputs=1, max_sequences=1, num_blocks=CONTEXT // 32, max_context=CONTEXT
)
WINDOWS = (256, 1024)
# Tokens of a step, and those of its sequence when it ends.
STEPS: Mapping[str, tuple[int, int]] = {"decode at 4096": (1, 4096), "prompt of 512 to 4096": (512, 4096)}


def features(bias: RelativeBias) -> dict[str, dict[str, Any]]:
    windows = {f"window {window}": {"window": window} for window in WINDOWS}
    return {"none": {}, **windows, "soft_cap": {"soft_cap": 50.0}, "bias": {"bias": bias}}


def compile_attention(**options: Any) -> NativeExecutable:
    """Layers of causal attention one after the other, and nothing else that takes time."""
    b = GraphBuilder()
    widths = {"q": NUM_HEADS * HEAD_DIM, "k": NUM_KV_HEADS * HEAD_DIM, "v": NUM_KV_HEADS * HEAD_DIM}
    x, k, v = (b.embedding("token_ids", name, size=VOCAB_SIZE, width=width) for name, width in widths.items())
    for layer_index in range(NUM_LAYERS):
        x = b.attention(
            x, k, v, layer_index=layer_index, head_dim=HEAD_DIM, scale=HEAD_DIM**-0.5, causal=True, **options
        )
    random = np.random.default_rng(0)
    shapes = {**{name: (VOCAB_SIZE, width) for name, width in widths.items()}, "bias": (32, NUM_HEADS)}
    tensors = {
        name: StoredTensor(
            name,
            TensorFormat.F32,
            shape,
            random.standard_normal(shape, np.float32).reshape(-1).view(np.uint8),
        )
        for name, shape in shapes.items()
    }
    graph = b.finish(logits=b.gather_rows(x))
    return compile_native(graph, tensors, weights="f32", limits=LIMITS, kv_dtype="f16", threads=1)


def make_batch(num_tokens: int, context_length: int) -> Batch:
    positions = np.arange(context_length - num_tokens, context_length, dtype=np.int32)
    return Batch(
        token_ids=positions % VOCAB_SIZE,
        positions=positions,
        sequence_starts=np.array([0, num_tokens], np.int32),
        context_lengths=np.array([context_length], np.int32),
        block_tables=np.arange(LIMITS.num_blocks, dtype=np.int32)[None],
        output_rows=np.array([num_tokens - 1], np.int32),
    )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    bias = RelativeBias(Parameter(("bias",), (32, NUM_HEADS)), max_distance=128, bidirectional=False)
    executables = {name: compile_attention(**options) for name, options in features(bias).items()}
    for executable in executables.values():
        executable.run(make_batch(CONTEXT, CONTEXT))
    seconds: dict[str, dict[str, list[float]]] = {}
    for step, (num_tokens, context_length) in STEPS.items():
        batch = make_batch(num_tokens, context_length)
        seconds[step] = {name: [] for name in executables}
        for _ in range(arguments.rounds):
            for name, executable in executables.items():
                start = time.thread_time()
                executable.run(batch)
                seconds[step][name].append(time.thread_time() - start)
    rows: list[tuple[str, object]] = []
    ratios = {}
    for step, of_step in seconds.items():
        for name in list(executables)[1:]:
            ratio = estimate_ratio(of_step[name], of_step["none"])
            ratios[f"{step}, {name}"] = asdict(ratio)
            rows.append((f"{step}: {name} over none", ratio))
    publish(arguments, {"ratios": ratios, "seconds": seconds}, rows)


if __name__ == "__main__":
    main()
