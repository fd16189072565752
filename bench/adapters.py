"""What adapters cost a step that decodes: no sequence has one, all have the same, each of four has its own;
in turns with the same model loaded without room for any."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fastserve.config import EngineOptions
from fastserve.engine.blueprint import graph_of
from fastserve.engine.load import load_model
from fastserve.graph.node import Linear
from fastserve.hub.resolve import resolve
from fastserve.types import NO_ADAPTER, Batch, Executable, Int32Array, LowRankMatrices
from report import DEFAULT_MODEL, make_parser, publish

NUM_ADAPTERS = 4
TARGETS = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "all": ("_proj",)}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 64])
    parser.add_argument("--targets", choices=TARGETS, default="all", help="linears that the adapters change")
    parser.add_argument("--context", type=int, default=128, help="tokens before the one that is decoded")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    options = EngineOptions(
        weights=arguments.weights, threads=arguments.threads, context_length=1024, kv_memory="512MiB"
    )
    path = resolve(arguments.model)
    plain = load_model(path, options).executable
    model = load_model(path, replace(options, max_adapters=NUM_ADAPTERS))
    shapes = {
        node.weight.names[0]: node.weight.shape
        for node in graph_of(model).nodes
        if isinstance(node, Linear) and any(t in node.weight.names[0] for t in TARGETS[arguments.targets])
    }
    results = {}
    for rank in arguments.ranks:
        swap_seconds = set_adapters(model.executable, shapes, rank)
        for size in arguments.batches:
            name = f"rank {rank}, {size} sequences"
            results[name] = measure(plain, model.executable, size, arguments) | {"swap_seconds": swap_seconds}
    publish(arguments, results, [(name, describe(result)) for name, result in results.items()])


def set_adapters(executable: Executable, shapes: Mapping[str, tuple[int, ...]], rank: int) -> float:
    """Fill all slots with random adapters; the median of what one took."""
    rng = np.random.default_rng(0)
    seconds = []
    for slot in range(NUM_ADAPTERS):
        matrices = {
            name: LowRankMatrices(
                rng.normal(size=(rank, columns), scale=0.01).astype(np.float32),
                rng.normal(size=(rows, rank), scale=0.01).astype(np.float32),
            )
            for name, (rows, columns) in shapes.items()
        }
        start = time.perf_counter()
        executable.set_adapter(slot, matrices)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(plain: Executable, executable: Executable, size: int, arguments: Any) -> dict[str, float]:
    """Median milliseconds of a step of so many sequences."""
    batch = decode_batch(plain, size, arguments.context)
    sides: dict[str, tuple[Executable, Int32Array | None]] = {
        "without_room": (plain, None),
        "no_adapter": (executable, np.full(size, NO_ADAPTER, np.int32)),
        "one_adapter": (executable, np.zeros(size, np.int32)),
        "four_adapters": (executable, np.arange(size, dtype=np.int32) % NUM_ADAPTERS),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(arguments.rounds + 3):
        for name, (side, slots) in sides.items():
            own = replace(batch, adapter_slots=slots)
            start = time.perf_counter()
            side.run(own)
            if round_ >= 3:  # after warming up
                seconds[name].append(time.perf_counter() - start)
    return {f"{name}_ms": 1000 * statistics.median(values) for name, values in seconds.items()}


def decode_batch(executable: Executable, size: int, context: int) -> Batch:
    """One token of each sequence, behind whatever the pool holds."""
    num_blocks = context // executable.block_size + 1
    return Batch(
        token_ids=np.arange(size, dtype=np.int32) + 100,
        positions=np.full(size, context, np.int32),
        sequence_starts=np.arange(size + 1, dtype=np.int32),
        context_lengths=np.full(size, context + 1, np.int32),
        block_tables=np.arange(size * num_blocks, dtype=np.int32).reshape(size, num_blocks),
        output_rows=np.arange(size, dtype=np.int32),
    )


def describe(result: Mapping[str, float]) -> str:
    base = result["without_room_ms"]
    names = ("no_adapter", "one_adapter", "four_adapters")
    ratios = ", ".join(f"{name.replace('_', ' ')} {result[f'{name}_ms'] / base:.2f}x" for name in names)
    return f"{base:.2f} ms a step; {ratios}; an adapter is swapped in {1000 * result['swap_seconds']:.0f} ms"


if __name__ == "__main__":
    main()
