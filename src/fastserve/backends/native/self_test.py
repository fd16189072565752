"""Whether the kernels that run on this machine compute what they should: a tiny Llama against stored logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastserve.backends.native.executable import NativeExecutable, compile_native
from fastserve.backends.native.weights import WeightFormat
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.graph.passes import optimize
from fastserve.models.family import build_graph, read_config
from fastserve.models.parameters import expected_parameters
from fastserve.types import Batch, Float32Array, Limits

# Odd sizes, so that every kernel meets a tail; 40 tokens, so that attention crosses a block.
_CONFIG = {
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
_TOKEN_IDS = [7 * index % 24 for index in range(40)]
_CHUNKS = (17, 1, 22)

# Of the last token, by the torch backend, float32 throughout (tests/backends/native/test_self_test.py).
EXPECTED_LOGITS = (0.0,)

# Largest difference as a share of the expected range. float32 differs in the order of sums alone; int8 rounds.
TOLERANCES: Mapping[WeightFormat, float] = {"f32": 1e-4, "int8": 5e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """What came out, by format of the weights."""

    isa: str
    differences: Mapping[WeightFormat, float]  # largest from EXPECTED_LOGITS, as a share of their range
    chunks_agree: bool  # a prompt in chunks gave the same bits as a prompt in one piece

    @property
    def passed(self) -> bool:
        # A difference that is not a number is within no tolerance.
        return self.chunks_agree and all(self.differences[f] <= TOLERANCES[f] for f in TOLERANCES)


def run_self_test(*, threads: int | None = None, isa: str | None = None) -> SelfTest:
    """Run the tiny model in every format; takes some milliseconds.

    Raises:
        OptionError: an unknown instruction set, or one that this CPU lacks.
    """
    differences = {}
    chunks_agree = True
    for weights in TOLERANCES:
        executable = compile_self_test(weights, threads=threads, isa=isa)
        whole = last_logits(executable, (len(_TOKEN_IDS),))
        chunks_agree &= np.array_equal(whole, last_logits(executable, _CHUNKS))
        differences[weights] = float(np.abs(whole - EXPECTED_LOGITS).max() / np.ptp(EXPECTED_LOGITS))
    return SelfTest(isa=executable.isa, differences=differences, chunks_agree=chunks_agree)
