"""The measurements behind the tables: every model and width beside its peers, kernels, limits, formats.

Each case is one command of its own and one file in --results; `--only` names cases to run, so that a long
series can be taken in parts. Peers are looked for in the environments of --peers, one folder each.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastserve.evaluate.random_model import make_model
from report import CHECKOUT, describe_conditions, make_parser

# Prompts and decoding beside all peers; many requests at once beside those whose batches come near ours: the
# others take minutes a run.
DECODER_PEERS = "llama.cpp,openvino,vllm"
BATCH_PEERS = "openvino,vllm"
ENCODER_PEERS = "onnxruntime,transformers"
SMOLLM2, MINILM = "smollm2-135m-instruct", "all-minilm-l6-v2"
SHAPES = ("llama-3.2-1b", "bert-base")  # written with random weights into --models


def _model(name: str, weights: str, peers: str, only: str | None = None) -> tuple[str, ...]:
    options = ("fastserve", "model", name, "--weights", weights, "--compare", peers)
    return options if only is None else (*options, "--only", only)


# Commands by the names of their files; a shape stands for the folder of a written model.
CASES: Mapping[str, Sequence[str]] = {
    "limits": ("fastserve", "limits"),
    "kernels": ("fastserve", "kernels", "--like", "llama-3.2-1b", "--weights", "int8", "--weights", "int4"),
    "llama-3.2-1b-int8": _model("llama-3.2-1b", "int8", DECODER_PEERS, "prefill_512,decode_1"),
    "llama-3.2-1b-int8-batch": _model("llama-3.2-1b", "int8", BATCH_PEERS, "batch_32"),
    "llama-3.2-1b-int4": _model("llama-3.2-1b", "int4", DECODER_PEERS, "prefill_512,decode_1"),
    "llama-3.2-1b-int4-batch": _model("llama-3.2-1b", "int4", BATCH_PEERS, "batch_32"),
    "smollm2-135m-int8": _model(SMOLLM2, "int8", DECODER_PEERS, "prefill_512,decode_1,batch_32"),
    "smollm2-135m-int4": _model(SMOLLM2, "int4", DECODER_PEERS, "prefill_512,decode_1,batch_32"),
    "minilm-int8": _model(MINILM, "int8", ENCODER_PEERS),
    "bert-base-int8": _model("bert-base", "int8", ENCODER_PEERS),
    "sparsity": ("sparsity.py",),
    "quality": ("quality.py", "--weights", "int8", "--tokens", "24576"),
    "busy_neighbour": ("busy_neighbour.py",),
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--peers", type=Path, required=True, help="the folder of the peers' environments")
    parser.add_argument("--results", type=Path, default=CHECKOUT / "bench" / "results" / "kernels")
    parser.add_argument("--models", type=Path, help="where written models are kept; by default nowhere")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7)
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        models = arguments.models or Path(folder)
        for name in arguments.only:
            print(f"{name}: {shlex.join(CASES[name])}", flush=True)
            run_case(CASES[name], arguments, models, arguments.results / f"{name}.json")


def run_case(case: Sequence[str], arguments: Namespace, models: Path, target: Path) -> None:
    """Run one case and write its file, or end with what the command said."""
    kind, *options = case
    if kind != "fastserve":
        call([sys.executable, str(CHECKOUT / "bench" / kind), *options, "--json", str(target)])
        return
    shown = ["fastserve", "bench", *options, "--threads", str(arguments.threads)]
    if options[0] == "model":
        shown += ["--pairs", str(arguments.pairs)]
    command = [sys.executable, "-m", "fastserve.cli.main", *shown[1:], "--json"]
    for shape in SHAPES:
        if options[:2] == ["model", shape]:
            command[command.index(shape)] = str(write_model(shape, models))
    if options[0] == "model":
        for python in sorted(arguments.peers.glob("*/bin/python")):
            command += ["--peer-python", str(python)]
    results = json.loads(call(command))
    conditions = {**describe_conditions(arguments), "command": shlex.join(shown)}
    document = {**conditions, "results": results}
    target.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def write_model(shape: str, folder: Path) -> Path:
    """The folder of a model of that shape, written where it is missing."""
    path = folder / shape
    if not (path / "config.json").exists():
        make_model(shape, path)
    return path


def call(command: Sequence[str]) -> str:
    """What a command prints."""
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"{shlex.join(command)} failed with exit code {result.returncode}: {result.stdout[-600:]}")
    return result.stdout


if __name__ == "__main__":
    main()
