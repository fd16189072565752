"""Decode and prefill rates of int8 weights at batch 1 against llama.cpp at Q8_0, in interleaved pairs.

Both get the same token ids and run in processes of their own, each first in half of the pairs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.evaluate.estimate import estimate_median, estimate_ratio
from fastserve.hub.resolve import resolve
from report import DEFAULT_MODEL, make_parser, publish

HERE = Path(__file__).resolve().parent
TEXT = "The library stood at the end of a long street, and nobody in the town remembered who had built it. "

Job = Mapping[str, Any]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--peer-python", type=Path, required=True, help="an interpreter with llama-cpp-python"
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="one that is a .gguf file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=128, help="decoded after the prompt")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of the prompt before decoding")
    parser.add_argument("--prefill-tokens", type=int, default=512)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = compare(arguments, Path(folder) / "q8_0.gguf")
    rows = []
    for task in ("decode", "prefill"):
        for name, estimate in results[task]["estimates"].items():
            rows.append((f"{task}: {name}", "{median:.4g} [{low:.4g}, {high:.4g}]".format_map(estimate)))
    rows.append(("same first tokens", results["decode"]["same_first_tokens"]))
    rows.append(("llama.cpp repacks weights for prefill", results["prefill"]["peer_repacks_weights"]))
    publish(arguments, results, rows)


def compare(arguments: argparse.Namespace, q8_0: Path) -> dict[str, Any]:
    model = resolve(arguments.model)
    ours = [sys.executable, str(HERE / "decode_with_fastserve.py")]
    theirs = [str(arguments.peer_python), str(HERE / "decode_with_llama_cpp.py")]
    peer = call(theirs, {"task": "quantize", "model": str(model), "target": str(q8_0)})
    token_ids = encode(model, max(arguments.prompt_tokens, arguments.prefill_tokens))
    job = {"threads": arguments.threads, "context_length": 1024}
    decode = {
        **job,
        "task": "decode",
        "prompt_ids": token_ids[: arguments.prompt_tokens],
        "num_tokens": arguments.tokens,
    }
    prefill = {**job, "task": "prefill", "prompt_ids": token_ids[: arguments.prefill_tokens]}

    def run_pairs(job: Job, *, repacks_weights: bool) -> list[dict[str, Any]]:
        turns = [("fastserve", ours, {**job, "model": str(model)})]
        turns += [("llama.cpp", theirs, {**job, "model": str(q8_0), "repacks_weights": repacks_weights})]
        return [
            {name: call(command, turn) for name, command, turn in turns[:: -1 if index % 2 else 1]}
            for index in range(arguments.pairs)
        ]

    # Matrix units that a virtual machine announces but does not have crash llama.cpp's repacked kernels in
    # batches; decoding, which uses them one token at a time, goes fastest with them.
    repacks_weights = not is_killed(theirs, {**prefill, "model": str(q8_0), "repacks_weights": True})
    decode_pairs = run_pairs(decode, repacks_weights=True)
    prefill_pairs = run_pairs(prefill, repacks_weights=repacks_weights)
    first = decode_pairs[0]
    return {
        "peer": peer,
        "decode": {
            **summarize(decode_pairs),
            "same_first_tokens": count_same(first["fastserve"]["token_ids"], first["llama.cpp"]["token_ids"]),
        },
        "prefill": {**summarize(prefill_pairs), "peer_repacks_weights": repacks_weights},
    }


def call(command: list[str], job: Job) -> dict[str, Any]:
    """What a fresh process measures."""
    result = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"{Path(command[1]).name} failed with exit code {result.returncode}:\n{result.stderr}")
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def is_killed(command: list[str], job: Job) -> bool:
    """Whether a job ends by a signal, such as that of an instruction that the machine lacks."""
    result = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False)
    return result.returncode < 0


def encode(model: Path, num_tokens: int) -> list[int]:
    """The first token ids of a long text."""
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(model))
    return tokenizer.encode(TEXT * num_tokens, add_special_tokens=False)[:num_tokens]


def summarize(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens per second of each engine and their ratio within pairs, estimated and as measured."""
    ours = [pair["fastserve"]["tokens_per_second"] for pair in pairs]
    theirs = [pair["llama.cpp"]["tokens_per_second"] for pair in pairs]
    estimates = {
        "fastserve, tokens/s": estimate_median(ours),
        "llama.cpp, tokens/s": estimate_median(theirs),
        "ratio": estimate_ratio(ours, theirs),
    }
    return {
        "estimates": {name: asdict(estimate) for name, estimate in estimates.items()},
        "fastserve": ours,
        "llama.cpp": theirs,
    }


def count_same(ours: list[int], theirs: list[int]) -> int:
    """How many first tokens are the same."""
    differing = (index for index, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other)
    return next(differing, len(ours))


if __name__ == "__main__":
    main()
