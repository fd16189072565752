"""How far other engines' predictions from what `fastserve convert` writes are from ours: transformers with
compressed-tensors, and llama.cpp. The reference has the same weights, dequantized to float32.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastserve.backends.native.executable import compile_native
from fastserve.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastserve.checkpoint.conversion import ConvertedWeights, Target
from fastserve.checkpoint.convert_checkpoint import convert
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.compress.quantize.w8a8 import prepare_w8a8, sample_texts
from fastserve.graph.passes import optimize
from fastserve.hub.resolve import resolve
from fastserve.models.family import build_graph, read_config
from fastserve.models.matrices import find_matrices
from quality import LIMITS, WINDOW_TOKENS, kl_divergence, log_softmax, read_text, run_logits
from report import DEFAULT_MODEL, make_parser, publish

FORMS: list[tuple[Target, ConvertedWeights]] = [
    ("safetensors", "f32"),
    ("compressed-tensors", "int8"),
    ("compressed-tensors", "w8a8"),
    ("compressed-tensors", "int4"),
    ("gguf", "f16"),
    ("gguf", "auto"),
]
NEAR_TIE = 0.1  # nats between the two likeliest tokens


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--tokens", type=int, default=WINDOW_TOKENS, help=f"at most {WINDOW_TOKENS}")
    parser.add_argument("--skip", type=int, default=0, help="tokens of the text that are passed over before")
    parser.add_argument("--peer-python", type=Path, metavar="PYTHON", help="one that has llama-cpp-python")
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(resolve(arguments.model))
    end = arguments.skip + arguments.tokens
    text = read_text(8 * end)
    token_ids = Tokenizer.from_checkpoint(checkpoint).encode(text, add_special_tokens=False)
    token_ids = token_ids[arguments.skip : end]
    results, rows = {}, []
    for target, weights in FORMS:
        if target == "gguf" and arguments.peer_python is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "model"
            matrices, source = find_matrices(checkpoint), checkpoint
            if weights == "w8a8":
                prepared = prepare_w8a8(checkpoint, sample_texts(checkpoint.path, checkpoint))
                source = prepared.checkpoint
                matrices = replace(matrices, float_activations=prepared.float_activations)
            convert(source, target, weights, output, matrices)
            expected = log_softmax(our_logits(open_checkpoint(output), token_ids))
            if target == "gguf":
                actual = logits_of_llama_cpp(arguments.peer_python, output, token_ids)
            else:
                actual = logits_of_transformers(output, token_ids)
            result = compare(expected, log_softmax(actual))
        name = f"{target} {weights}"
        results[name] = result
        rows.append((f"{name}: mean KL", f"{result['mean_kl']:.6f}"))
        rows.append((f"{name}: same likeliest token", f"{result['top_token_agreement']:.2%}"))
        rows.append((f"{name}: outside near-ties", f"{result['agreement_outside_ties']:.2%}"))
    publish(arguments, results, rows)


def compare(expected: NDArray[np.float64], actual: NDArray[np.float64]) -> dict[str, float]:
    """Of log probabilities [tokens, vocab]."""
    same = expected.argmax(axis=1) == actual.argmax(axis=1)
    best = np.partition(expected, -2, axis=1)[:, -2:]
    is_clear = best[:, 1] - best[:, 0] > NEAR_TIE
    return {
        "mean_kl": float(kl_divergence(expected, actual).mean()),
        "top_token_agreement": float(same.mean()),
        "agreement_outside_ties": float(same[is_clear].mean()),
    }


def our_logits(checkpoint: Checkpoint, token_ids: list[int]) -> NDArray[np.float32]:
    graph = optimize(build_graph(read_config(checkpoint.config), checkpoint.tensors))
    executable = compile_native(graph, checkpoint.tensors, weights="f32", kv_dtype="f32", limits=LIMITS)
    return run_logits(executable, token_ids).copy()


def logits_of_transformers(folder: Path, token_ids: list[int]) -> NDArray[np.float32]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.tensor([token_ids])).logits[0].float().numpy()
    return logits


def logits_of_llama_cpp(python: Path, folder: Path, token_ids: list[int]) -> NDArray[np.float32]:
    output = folder / "logits.npy"
    model = str(next(folder.glob("*.gguf")))
    job = {"model": model, "token_ids": token_ids, "output": str(output), "threads": 2}
    script = str(Path(__file__).with_name("logits_of_llama_cpp.py"))
    subprocess.run([str(python), script], input=json.dumps(job) + "\n", text=True, check=True)
    logits: NDArray[np.float32] = np.load(output)
    return logits


if __name__ == "__main__":
    main()
