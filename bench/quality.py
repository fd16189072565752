"""How far weight formats move the model's predictions from those of float32: mean KL on wikitext-2."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from fastserve.backends.native.executable import NativeExecutable, compile_native
from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.config import WeightFormat
from fastserve.graph.passes import optimize
from fastserve.hub.resolve import resolve
from fastserve.models.family import build_graph, read_config
from fastserve.types import Batch, Limits
from report import CHECKOUT, DEFAULT_MODEL, make_parser, publish

WINDOW_TOKENS = 512
BLOCKS = 16
LIMITS = Limits(
    max_tokens=WINDOW_TOKENS,
    max_outputs=WINDOW_TOKENS,
    max_sequences=1,
    num_blocks=BLOCKS,
    max_context=WINDOW_TOKENS,
)
CHARACTERS_PER_TOKEN = 8  # more than there are


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--weights", nargs="+", default=["int8", "bf16"], choices=get_args(WeightFormat))
    parser.add_argument("--tokens", type=int, default=8192, help=f"in windows of {WINDOW_TOKENS}")
    arguments = parser.parse_args()
    results = compare(arguments.model, arguments.weights, arguments.tokens)
    rows = []
    for weights, result in results.items():
        rows.append((f"{weights}: mean KL to f32", f"{result['mean_kl']:.5f}"))
        rows.append((f"{weights}: 99th percentile", f"{result['p99_kl']:.5f}"))
        rows.append((f"{weights}: same likeliest token", f"{result['top_token_agreement']:.1%}"))
    publish(arguments, results, rows)


def compare(model: str, weights_formats: list[str], num_tokens: int) -> dict[str, dict[str, float]]:
    """Weights in each format with float16 KV, against weights and KV in float32, at every position."""
    checkpoint = open_checkpoint(resolve(model))
    graph = optimize(build_graph(read_config(checkpoint.config), checkpoint.tensors))

    def make(weights: Any, kv_dtype: Any) -> NativeExecutable:
        return compile_native(graph, checkpoint.tensors, weights=weights, kv_dtype=kv_dtype, limits=LIMITS)

    reference = make("f32", "f32")
    executables = {weights: make(weights, "f16") for weights in weights_formats}
    divergences: dict[str, list[NDArray[np.float64]]] = {weights: [] for weights in weights_formats}
    agreements: dict[str, list[NDArray[np.bool_]]] = {weights: [] for weights in weights_formats}
    token_ids = Tokenizer.from_checkpoint(checkpoint).encode(
        read_text(num_tokens * CHARACTERS_PER_TOKEN), add_special_tokens=False
    )
    for start in range(0, num_tokens, WINDOW_TOKENS):
        window = token_ids[start : min(start + WINDOW_TOKENS, num_tokens)]
        expected = log_softmax(run_logits(reference, window))
        for weights, executable in executables.items():
            actual = log_softmax(run_logits(executable, window))
            divergences[weights].append(kl_divergence(expected, actual))
            agreements[weights].append(expected.argmax(axis=1) == actual.argmax(axis=1))
    return {
        weights: {
            "mean_kl": float(np.concatenate(divergences[weights]).mean()),
            "p99_kl": float(np.percentile(np.concatenate(divergences[weights]), 99)),
            "top_token_agreement": float(np.concatenate(agreements[weights]).mean()),
        }
        for weights in weights_formats
    }


def read_text(num_characters: int) -> str:
    """The beginning of wikitext-2's validation text, from FASTSERVE_TEST_DATA or beside the checkout."""
    data = Path(os.environ.get("FASTSERVE_TEST_DATA", CHECKOUT.parent / "shared" / "data"))
    with (data / "lm_wikitext2" / "valid.txt").open(encoding="utf-8") as file:
        return file.read(num_characters)


def run_logits(executable: NativeExecutable, token_ids: list[int]) -> NDArray[np.float32]:
    """Logits [tokens, vocab] at every position of one window."""
    num_tokens = len(token_ids)
    positions = np.arange(num_tokens, dtype=np.int32)
    batch = Batch(
        token_ids=np.asarray(token_ids, np.int32),
        positions=positions,
        sequence_starts=np.asarray([0, num_tokens], np.int32),
        context_lengths=np.asarray([num_tokens], np.int32),
        block_tables=np.arange(BLOCKS, dtype=np.int32)[None],
        output_rows=positions,
    )
    return executable.run(batch).outputs["logits"]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural-log probabilities [rows, vocab]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def kl_divergence(expected: NDArray[np.float64], actual: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(expected || actual) [rows] in nats, from log probabilities [rows, vocab]."""
    return (np.exp(expected) * (expected - actual)).sum(axis=1)


if __name__ == "__main__":
    main()
