"""Tiny random models of every family, as `fastserve convert --to gguf` writes them, in llama.cpp, against
what transformers computes of the same weights. Another interpreter has cyllama (llama.cpp, in a wheel).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.convert_checkpoint import convert
from fastserve.checkpoint.gguf_family import FAMILIES
from fastserve.errors import UnsupportedError
from fastserve.models.family import ENCODER_DECODER_FAMILIES, ENCODER_FAMILIES
from fastserve.models.matrices import find_matrices
from quality import CHECKOUT, kl_divergence, log_softmax
from report import make_parser, publish

sys.path[:0] = [str(CHECKOUT / "tests"), str(CHECKOUT / "tests" / "models")]

from family_table import CONFIGS, SAID_IN_GGUF, TEXT, save  # noqa: E402


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--peer-python", type=Path, metavar="PYTHON", required=True, help="one with cyllama")
    parser.add_argument("--only", nargs="*", default=list(CONFIGS), help="values of model_type")
    arguments = parser.parse_args()
    results, rows = {}, []
    for model_type in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(model_type, Path(folder), arguments.peer_python)
        results[model_type] = result
        told = ", ".join(f"{name} {value:.2g}" for name, value in result.items())
        rows.append((model_type, told or "not written"))
    publish(arguments, results, rows)


def measure(model_type: str, folder: Path, python: Path) -> dict[str, float]:
    """How far llama.cpp's output is from that of transformers, as a share of the range; of logits, the mean
    KL divergence and how often the likeliest token is the same. Nothing of a family that GGUF has not."""
    config = {**SAID_IN_GGUF.get(model_type, CONFIGS[model_type])}
    if model_type in FAMILIES and FAMILIES[model_type].ignores_window:
        config["sliding_window"] = None
    expected = save(model_type, folder / "saved", config)
    checkpoint = open_checkpoint(folder / "saved")
    try:
        convert(checkpoint, "gguf", "f32", folder / "written", find_matrices(checkpoint))
    except UnsupportedError:
        return {}
    is_encoder, is_both = model_type in ENCODER_FAMILIES, model_type in ENCODER_DECODER_FAMILIES
    kind = "encoder" if is_encoder else "encoder-decoder" if is_both else "decoder"
    output = folder / "output.npy"
    job = {"model": str(folder / "written" / "written.gguf"), "kind": kind, "token_ids": TEXT}
    script = Path(__file__).with_name("outputs_of_llama_cpp.py")
    text = json.dumps({**job, "output": str(output)})
    subprocess.run([str(python), str(script)], input=text, text=True, check=True)
    actual: NDArray[np.float32] = np.load(output)
    if is_encoder:
        actual = actual.mean(0, keepdims=True)
    found = {"share of the range": float(np.abs(actual - expected).max() / np.ptp(expected))}
    if is_encoder:
        return found
    return found | {
        "KL": float(kl_divergence(log_softmax(expected), log_softmax(actual)).mean()),
        "same token": float((actual.argmax(1) == expected.argmax(1)).mean()),
    }


if __name__ == "__main__":
    main()
