"""What the recipes that ship make of a model, each run by its name with `fastserve compress`: bytes, quality,
and how far transformers with compressed-tensors is from our runtime on an artifact whose format it has.

    python bench/compress_recipes.py --work DIR --limit 4 --json FILE
    python bench/compress_recipes.py --model TUNED --calibration FILE --judged FILE --work DIR --json FILE

Unless files are given, it is calibrated on the second half of wikitext-2 (valid), and judged on windows of
the first. Artifacts stay in `--work`, and those that are there are not made again. Speed is in their own
reports, and not here: it is worth something on a machine that does nothing else.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress_quality import split_text
from convert_agreement import compare
from fastserve.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.file import read_optional_json
from fastserve.checkpoint.tensor import TensorFormat
from fastserve.compress.model_kind import writes_text
from fastserve.compress.recipe import read_recipe, recipe_names
from fastserve.evaluate.language_model import LanguageModel, read_windows
from fastserve.evaluate.prediction import PredictorOptions
from fastserve.evaluate.predictor import open_predictor
from fastserve.evaluate.task.table import SETTINGS_FILE, task_of_folder
from fastserve.types import Float32Array
from quality import log_softmax
from report import DEFAULT_MODEL, make_parser, publish

RECIPES = ["int4-rtn", "int4-gptq", "int4-awq", "w8a8-smoothquant", "sparse50-int8", "sparse50-int4"]
LIBRARIES = ("transformers", "compressed-tensors", "torch")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=recipe_names())
    parser.add_argument("--calibration", type=Path, help="text or rows")
    parser.add_argument("--judged", type=Path, help="text, or rows of the model's task")
    parser.add_argument("--limit", type=int, default=16, help="windows of 512 tokens, or rows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, required=True, help="folder for models, kept")
    arguments = parser.parse_args()
    if Path(arguments.model).exists():
        arguments.model = Path(arguments.model).resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    judged, calibration = split_text(arguments.work)
    judged = arguments.judged or judged
    calibration = arguments.calibration or calibration
    results: dict[str, Any] = {"versions": {name: importlib.metadata.version(name) for name in LIBRARIES}}
    rows: list[tuple[str, object]] = []
    for recipe in arguments.recipes:
        output = arguments.work / recipe
        if not output.exists():
            run_recipe(arguments, recipe, output, calibration, judged)
        results[recipe] = found = figures(output)
        if is_for_transformers(output):
            found["transformers"] = compare_with_transformers(
                output, judged, arguments.threads, arguments.limit
            )
        rows += [(f"{recipe}: {name}", json.dumps(value)) for name, value in found.items()]
        publish(arguments, results, rows)  # those so far: a recipe may take an hour


def run_recipe(arguments: Any, recipe: str, output: Path, calibration: Path, judged: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fastserve.cli.main",
        "compress",
        arguments.model,
        "--recipe",
        recipe,
        "--json",
    ]
    command += ["--output", str(output), "--data", str(judged), "--limit", str(arguments.limit)]
    command += ["--threads", str(arguments.threads), "--resume"]
    if read_recipe(recipe).calibrates:
        command += ["--calibration", str(calibration)]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def figures(output: Path) -> dict[str, Any]:
    """Of the report in an artifact, what does not depend on what else the machine does."""
    report = json.loads((output / "compression" / "report.json").read_text(encoding="utf-8"))
    errors = [layer["errors"][-1]["relative_error"] for layer in report["layers"] if layer["errors"]]
    return {
        "size": report["size"],
        "quality": report["quality"],
        "mean_error_of_a_matrix": float(np.mean(errors)),
        "notes": report["notes"],
    }


def is_for_transformers(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return bool(config.get("quantization_config", {}).get("quant_method") == "compressed-tensors")


def compare_with_transformers(folder: Path, judged: Path, threads: int, most_rows: int) -> dict[str, Any]:
    """How many tensors transformers dequantizes to other bits than we; and how far its predictions on one
    window of text, or on rows to classify, are from those of the runtime, with exact activations and as it is
    served: where it computes in the type that it opens the artifact in, and with the same weights in float32.
    """
    import torch
    import transformers

    checkpoint = open_checkpoint(folder)
    model = getattr(transformers, checkpoint.config["architectures"][0]).from_pretrained(folder).eval()
    is_decoder = writes_text(checkpoint)
    if is_decoder:
        inputs: list[Any] = [torch.tensor([read_windows(checkpoint, judged, most=1)[0]])]
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        rows = [json.loads(line) for line in judged.read_text(encoding="utf-8").splitlines()[:most_rows]]
        length = read_optional_json(folder / SETTINGS_FILE)["max_length"]  # as it was tuned
        inputs = [
            tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=length).input_ids
            for row in rows
        ]

    def predict() -> NDArray[np.float64]:
        with torch.no_grad():
            return log_softmax(
                np.concatenate([model(ids).logits.float().reshape(-1, size) for ids in inputs])
            )

    size = checkpoint.config["vocab_size"] if is_decoder else len(checkpoint.config["id2label"])
    theirs = {str(model.dtype).removeprefix("torch."): predict()}  # which dequantizes
    found: dict[str, Any] = {"tensors": len(checkpoint.tensors), "differ": differing(checkpoint, model)}
    torch.nn.Module.float(model)  # its own refuses, as if its weights were still whole numbers
    theirs["float32"] = predict()
    for name, exact in (("exact activations", True), ("as served", False)):
        if is_decoder:
            expected = our_tokens(folder, inputs[0][0].tolist(), threads, exact=exact)
        else:
            expected = our_labels(folder, checkpoint.config["id2label"], rows, threads, exact=exact)
        for dtype, predictions in theirs.items():
            found[f"{name}, to transformers in {dtype}"] = compare(expected, predictions)
    return found


def our_tokens(folder: Path, window: list[int], threads: int, *, exact: bool) -> NDArray[np.float64]:
    """Log probabilities [tokens, vocab]."""
    options: dict[str, Any] = {"weights": "f32", "kv_dtype": "f32"} if exact else {}
    return log_softmax(logits_of(LanguageModel(folder, threads=threads, **options), window))


def our_labels(
    folder: Path, labels: dict[str, str], rows: list[Any], threads: int, *, exact: bool
) -> NDArray[np.float64]:
    """Log probabilities [rows, labels]."""
    options = PredictorOptions(weights="f32" if exact else "auto", threads=threads, truncate=True)
    predictor = open_predictor(folder, task_of_folder(folder), options, note=print)
    predictions = predictor.predict(rows)
    predictor.close()
    names = [labels[str(index)] for index in range(len(labels))]
    return np.log([[prediction["probabilities"][name] for name in names] for prediction in predictions])


def logits_of(model: LanguageModel, window: list[int]) -> Float32Array:
    return np.concatenate([piece.copy() for piece in model.logits(window)])


def differing(checkpoint: Checkpoint, model: Any) -> list[str]:
    """Names of the tensors whose numbers are not the same bits in both."""
    import torch

    state = model.state_dict()
    names = []
    for name, tensor in checkpoint.tensors.items():
        theirs = state[name]
        ours = torch.from_numpy(to_f32(tensor))
        if tensor.format is TensorFormat.F32:  # as transformers loads what is stored finer than the model is
            ours = ours.to(theirs.dtype).float()
        if not torch.equal(theirs.float(), ours):
            names.append(name)
    return names


if __name__ == "__main__":
    main()
