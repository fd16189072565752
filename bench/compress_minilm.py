"""MiniLM tuned on a set of labelled texts, then pruned and quantized: what is kept of its accuracy, how many
bytes are left, and how fast the native runtime is with it.

    python bench/compress_minilm.py --data shared/data --set sms --work DIR --json FILE
    python bench/compress_minilm.py --what speed --set sms --work DIR --seconds 40 --json FILE
    python bench/compress_minilm.py --what few-bits --data shared/data --set sms --work DIR --json FILE

The first makes seven models: `dense-int8`; `sparse60-int8`, 60 % of the weights of all linears zero
(SparseGPT), and `sparse60-recovered-int8`, then tuned again; `structured40-int8`, 40 % of heads and neurons
taken out, then tuned again; the same before it is tuned (`unrecovered`), and before what is left is fitted to
calibration text (`cut`); `distilled-half-int8`, half of the layers, taught by the whole model. Token tables
are int8 in all of them. Accuracy is of test rows that nothing has seen, by the native runtime; shares kept
are of the tuned model in float32, with bootstrap intervals over rows. The second times the models that the
first has made, in turns, one round after the other, on one thread. The third makes models of 3 and of 2 bits,
64 columns a scale, linears alone: rounded to nearest (`rtn`), by GPTQ, and tuned on the grid (`qat`) as long
as models that were cut are tuned again.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.compress.artifact import write_artifact
from fastserve.compress.calibration import calibration_tokens
from fastserve.compress.recipe import parse_recipe
from fastserve.compress.step import Context, WorkingModel
from fastserve.evaluate.bootstrap import bootstrap
from fastserve.evaluate.prediction import PredictorOptions
from fastserve.evaluate.predictor import open_predictor
from fastserve.evaluate.task.table import task_of_folder
from fastserve.evaluate.task_evaluation import Evaluation, evaluate_folder
from fastserve.models.matrices import find_matrices
from fastserve.tune import TuneOptions, tune
from report import make_parser, publish
from tune_sets import SETS

TASK = "text-classification"
TAKEN_OUT = {"neurons": 0.4, "heads": 0.4, "multiple": 64}
SPARSE = {"sparsegpt": {"sparsity": 0.6}}
STRUCTURED = {"structured": TAKEN_OUT}
INT8: list[Any] = [{"rtn": {"bits": 8, "targets": {"tables": True}}}]


@dataclass(frozen=True)
class Sizes:
    """Rows of each split, and how the set is learned."""

    train: int
    dev: int
    test: int
    options: TuneOptions
    recovery: Mapping[str, Any]

    @property
    def teaching(self) -> dict[str, Any]:
        """How a student of half the layers learns."""
        return {**self.recovery, "epochs": self.options.epochs, "soft_weight": 0.7}


SIZES = {
    "sms": Sizes(
        2000,
        500,
        2000,
        TuneOptions(epochs=3, learning_rate=1e-4, max_length=64, device="cpu"),
        {"epochs": 1, "learning_rate": 1e-4, "max_length": 64, "device": "cpu"},
    ),
    "banking77": Sizes(
        5000,
        1000,
        3000,
        TuneOptions(epochs=5, learning_rate=3e-4, max_length=48, batch_size=32, device="cpu"),
        {"epochs": 2, "learning_rate": 2e-4, "max_length": 48, "batch_size": 32, "device": "cpu"},
    ),
}


def recipes(recovery: Mapping[str, Any], teaching: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The steps of each model."""
    return {
        "dense-int8": INT8,
        "sparse60-int8": [SPARSE, *INT8],
        "sparse60-recovered-int8": [SPARSE, {"recover": {"tune": dict(recovery)}}, *INT8],
        "structured40-cut-int8": [{"structured": {**TAKEN_OUT, "refit": False}}, *INT8],
        "structured40-unrecovered-int8": [STRUCTURED, *INT8],
        "structured40-int8": [STRUCTURED, {"recover": {"tune": dict(recovery)}}, *INT8],
        "distilled-half-int8": [{"distil": {"share": 0.5, "tune": dict(teaching)}}, *INT8],
    }


def recipes_of_few_bits(recovery: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The steps of each model of 3 and 2 bits."""
    found: dict[str, list[Any]] = {}
    for bits in (3, 2):
        found[f"rtn{bits}"] = [{"rtn": {"bits": bits}}]
        found[f"gptq{bits}"] = [{"gptq": {"bits": bits}}]
        found[f"qat{bits}"] = [{"qat": {"bits": bits, "tune": dict(recovery)}}]
    return found


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--what", choices=("quality", "few-bits", "speed"), default="quality")
    parser.add_argument("--data", type=Path, help="folder of the sets")
    parser.add_argument("--set", choices=sorted(SIZES), default="sms")
    parser.add_argument("--work", type=Path, required=True, help="folder for rows and models, kept")
    parser.add_argument("--model", default="all-minilm-l6-v2")
    parser.add_argument("--tuned", type=Path, help="the tuned model, where there is one already")
    parser.add_argument("--seconds", type=float, default=40.0, help="of speed")
    parser.add_argument("--batch", type=int, default=32, help="texts at a time, of speed")
    parser.add_argument("--seed", type=int, default=0, help="of the split, of tuning and of each recipe")
    options = parser.parse_args()
    if options.what == "speed":
        compare_speeds(options)
    else:
        compare_models(options)


def write_splits(data: Path, name: str, work: Path, seed: int) -> dict[str, Path]:
    """Rows to train on, to choose by, and to judge by, in files; a text that occurs twice is taken once."""
    sizes = SIZES[name]
    found = SETS[name].read(data)
    assert isinstance(found, list)
    labels: dict[str, str] = {}
    for row in found:
        labels.setdefault(row["text"].strip(), row["label"])
    rows = [{"text": text, "label": label} for text, label in labels.items()]
    random.Random(seed).shuffle(rows)
    paths = {}
    for split, size in (("train", sizes.train), ("dev", sizes.dev), ("test", sizes.test)):
        paths[split] = work / f"{name}-{split}.jsonl"
        chosen, rows = rows[:size], rows[size:]
        paths[split].write_text("".join(f"{json.dumps(row)}\n" for row in chosen), encoding="utf-8")
    return paths


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def compare_models(options: argparse.Namespace) -> None:
    work, sizes = options.work, SIZES[options.set]
    work.mkdir(parents=True, exist_ok=True)
    files = write_splits(options.data, options.set, work, options.seed)
    tuned = options.tuned or work / f"{options.set}-tuned"
    if not tuned.exists():
        tune(
            TASK,
            model=options.model,
            train=files["train"],
            dev=files["dev"],
            output=tuned,
            options=replace(sizes.options, seed=options.seed),
            resume=True,
        )
    rows = read_rows(files["test"])
    whole = evaluate_folder(tuned, rows, PredictorOptions(weights="f32", truncate=True))
    f32_bytes = sum(4 * count_elements(t.shape) for t in open_checkpoint(tuned).tensors.values())
    results: dict[str, Any] = {
        "set": options.set,
        "rows": {split: len(read_rows(path)) for split, path in files.items()},
        "f32": {"accuracy": accuracy(whole), "weight_bytes": f32_bytes},
    }
    shown: list[tuple[str, object]] = [
        ("tuned, f32", f"accuracy {accuracy(whole):.4f}, {f32_bytes / 1e6:.1f} MB of weights")
    ]
    made = recipes(sizes.recovery, sizes.teaching)
    if options.what == "few-bits":
        made = recipes_of_few_bits(sizes.recovery)
    for name, steps in made.items():
        output = work / f"{options.set}-{name}"
        sizes_of = build(tuned, steps, files, output, seed=options.seed)
        found = evaluate_folder(output, rows, PredictorOptions(truncate=True))
        kept = share_kept(whole, found, rows)
        results[name] = {
            "steps": steps,
            "accuracy": accuracy(found),
            "kept": kept,
            "zeros_of_linears": zeros_of_linears(output),
            "weight_bytes": sizes_of["weight_bytes"],
            "share_of_f32_bytes": sizes_of["weight_bytes"] / f32_bytes,
            "form": sizes_of["form"],
            "notes": sizes_of["notes"],
        }
        shown.append(
            (
                name,
                f"accuracy {accuracy(found):.4f}, kept {kept['value']:.2%} [{kept['low']:.2%},"
                f" {kept['high']:.2%}], {sizes_of['weight_bytes'] / 1e6:.1f} MB,"
                f" {sizes_of['weight_bytes'] / f32_bytes:.1%} of f32",
            )
        )
    publish(options, results, shown)


def build(
    tuned: Path, steps: list[Any], files: Mapping[str, Path], output: Path, *, seed: int
) -> dict[str, Any]:
    """Run a recipe and write its model, where that is not there. Returns its sizes and notes."""
    about = output.with_suffix(".json")
    if not output.exists():
        checkpoint = open_checkpoint(tuned)
        recipe = parse_recipe({"steps": steps}, name=output.name)
        scratch = output.with_name(f"{output.name}.scratch")
        scratch.mkdir(exist_ok=True)
        context = Context(
            source=tuned,
            scratch=scratch,
            calibration=calibration_tokens(
                checkpoint, files["train"], num_sequences=256, length=64, seed=seed
            ),
            train=files["train"],
            dev=files["dev"],
            task=TASK,
            seed=seed,
        )
        model = WorkingModel(checkpoint=checkpoint)
        for named in recipe.steps:
            model = named.step.run(model, context)
        written = write_artifact(model, output, {"recipe": recipe.to_json()})
        document = {"weight_bytes": written.weight_bytes, "form": written.form, "notes": context.notes}
        about.write_text(json.dumps(document), encoding="utf-8")
    found: dict[str, Any] = json.loads(about.read_text(encoding="utf-8"))
    return found


def zeros_of_linears(folder: Path) -> float:
    """The share of zeros in the whole numbers of all linears but the tables."""
    checkpoint = open_checkpoint(folder)
    zeros = elements = 0
    for name in find_matrices(checkpoint).linears:
        tensor = checkpoint.tensors[name]
        assert isinstance(tensor, GroupedTensor), f"{name} is not quantized"
        codes = tensor.groups(0, tensor.shape[0]).codes
        zeros, elements = zeros + int((codes == 0).sum()), elements + codes.size
    return zeros / elements


def count_elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def accuracy(found: Evaluation) -> float:
    return float(found.scores.metrics["accuracy"])


def share_kept(whole: Evaluation, found: Evaluation, rows: list[dict[str, Any]]) -> dict[str, float]:
    """The accuracy over that of the whole model, and its interval: rows are resampled for both alike."""
    right = [
        [prediction["label"] == row["label"] for prediction, row in zip(one.predictions, rows, strict=True)]
        for one in (whole, found)
    ]
    interval = bootstrap(
        lambda chosen: {"kept": sum(right[1][i] for i in chosen) / sum(right[0][i] for i in chosen)},
        len(rows),
        resamples=1000,
        seed=0,
    )["kept"]
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def compare_speeds(options: argparse.Namespace) -> None:
    """Pairs of runs of `dense-int8` and each other model on the same texts, in turns."""
    rows = read_rows(options.work / f"{options.set}-test.jsonl")
    batches = [rows[i : i + options.batch] for i in range(0, len(rows) - options.batch + 1, options.batch)]
    folders = {name: options.work / f"{options.set}-{name}" for name in recipes({}, {})}
    alone = PredictorOptions(truncate=True, threads=1)
    predictors = {
        name: open_predictor(folder, task_of_folder(folder), alone, note=print)
        for name, folder in folders.items()
    }
    times: dict[str, list[float]] = {name: [] for name in folders}
    for predictor in predictors.values():
        predictor.predict(batches[0])
    end = time.monotonic() + options.seconds
    number = 0
    while time.monotonic() < end:
        batch = batches[number % len(batches)]
        order = list(predictors) if number % 2 else list(reversed(predictors))
        for name in order:
            started = time.perf_counter()
            predictors[name].predict(batch)
            times[name].append(time.perf_counter() - started)
        number += 1
    results: dict[str, Any] = {"set": options.set, "pairs": number, "texts_at_a_time": options.batch}
    shown: list[tuple[str, object]] = [("pairs of runs", number)]
    for name, seconds in times.items():
        ratios = [dense / other for dense, other in zip(times["dense-int8"], seconds, strict=True)]
        found = bootstrap(
            lambda chosen, ratios=ratios: {"ratio": statistics.median(ratios[i] for i in chosen)},
            len(ratios),
            resamples=1000,
            seed=0,
        )["ratio"]
        results[name] = {
            "speed_over_dense_int8": {"value": found.value, "low": found.low, "high": found.high},
            "median_seconds": statistics.median(seconds),
            "least_seconds": min(seconds),
        }
        shown.append(
            (
                name,
                f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}] times as fast as dense-int8;"
                f" median {1000 * statistics.median(seconds):.1f} ms, least {1000 * min(seconds):.1f} ms",
            )
        )
    for predictor in predictors.values():
        predictor.close()
    publish(options, results, shown)


if __name__ == "__main__":
    main()
