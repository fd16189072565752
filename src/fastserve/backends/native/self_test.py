"""Whether the kernels that run here compute what they should: a tiny Llama against stored logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from fastserve.backends.native.executable import compile_native
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.config import WeightFormat
from fastserve.graph.node import Graph
from fastserve.graph.passes import optimize
from fastserve.models.family import build_graph, read_config
from fastserve.models.parameters import expected_parameters
from fastserve.types import Batch, Executable, Float32Array, Limits

# Odd sizes, so that every kernel meets a tail.
CONFIG = {
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 72,
    "intermediate_size": 150,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 18,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
TOKEN_IDS = tuple(7 * position % 24 for position in range(40))  # more than a KV block holds
LIMITS = Limits(max_tokens=40, max_outputs=1, max_sequences=1, num_blocks=2, max_context=64)
_CHUNKS = (17, 1, 22)

# Of the last token, by the torch backend in float32 (held by tests/backends/native/test_self_test.py).
EXPECTED_LOGITS = np.asarray(
    [
        -1.286383,
        -0.048061,
        -0.506646,
        -0.782612,
        -0.035927,
        -0.562682,
        -0.308021,
        -0.274866,
        -0.171367,
        0.323031,
        0.639313,
        0.598296,
        1.723651,
        0.563534,
        0.45609,
        -0.896851,
        -1.395382,
        -1.03299,
        -0.488281,
        -0.846079,
        0.836069,
        -1.034055,
        -0.823498,
        -0.442684,
    ]
)

# Largest difference as a share of the range of the expected logits. float32 differs by the order of its sums
# (measured: 1e-6), int8 by its rounding (measured: 0.03, alike on every instruction set).
TOLERANCES: Mapping[WeightFormat, float] = {"f32": 1e-5, "int8": 0.06}


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """What came out."""

    isa: str
    differences: Mapping[WeightFormat, float]  # largest from EXPECTED_LOGITS, as a share of their range
    chunks_agree: bool  # a prompt in chunks gave the same bits as a prompt in one piece

    @property
    def is_passed(self) -> bool:
        within = (self.differences[weights] <= TOLERANCES[weights] for weights in TOLERANCES)
        return self.chunks_agree and all(within)


def run_self_test(*, threads: int | None = None, isa: str | None = None) -> SelfTest:
    """Run the tiny model in each format of TOLERANCES, in milliseconds. Options as for `compile_native`.

    Raises:
        OptionError: an unknown instruction set, or one that this CPU lacks.
    """
    graph = build_graph(read_config(CONFIG))
    parameters = make_parameters(graph)
    tensors = {name: _store(name, array) for name, array in parameters.items()}
    differences: dict[WeightFormat, float] = {}
    chunks_agree = True
    for weights in TOLERANCES:
        executable = compile_native(
            optimize(graph), tensors, weights=weights, limits=LIMITS, kv_dtype="f32", threads=threads, isa=isa
        )
        logits = run_logits(executable, (len(TOKEN_IDS),))
        chunks_agree &= np.array_equal(logits, run_logits(executable, _CHUNKS))
        differences[weights] = float(np.abs(logits - EXPECTED_LOGITS).max() / np.ptp(EXPECTED_LOGITS))
    return SelfTest(isa=executable.isa, differences=differences, chunks_agree=chunks_agree)


def make_parameters(graph: Graph) -> dict[str, Float32Array]:
    """Random parameters: vectors of deviation 1, matrices scaled so that values keep their size.

    Drawn from `RandomState`, whose numbers numpy never changes (NEP 19).
    """
    random = np.random.RandomState(0)
    return {
        name: (random.standard_normal(shape) / (shape[-1] ** 0.5 if len(shape) == 2 else 1)).astype(
            np.float32
        )
        for name, shape in expected_parameters(graph).items()
    }


def run_logits(executable: Executable, chunks: Sequence[int]) -> Float32Array:
    """Logits [vocab] of the last of TOKEN_IDS, run in chunks of these sizes."""
    for start, stop in pairwise(accumulate(chunks, initial=0)):
        batch = Batch(
            token_ids=np.asarray(TOKEN_IDS[start:stop], np.int32),
            positions=np.arange(start, stop, dtype=np.int32),
            sequence_starts=np.asarray([0, stop - start], np.int32),
            context_lengths=np.asarray([stop], np.int32),
            block_tables=np.asarray([[1, 0]], np.int32),
            output_rows=np.asarray([stop - start - 1], np.int32),
        )
        logits = executable.run(batch).outputs["logits"]
    last: Float32Array = logits[0].copy()
    return last


def _store(name: str, array: Float32Array) -> StoredTensor:
    return StoredTensor(name, TensorFormat.F32, array.shape, array.reshape(-1).view(np.uint8))
