"""What quantization costs an encoder: the accuracy of the nearest centroid of its embeddings, on banking77.

Each label's centroid is the mean of some texts' embeddings; other texts go to the label whose centroid has
the largest cosine. Calibration is on yet others.
"""

from __future__ import annotations

import csv
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastserve.backends.torch.ops import OPS
from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.compress.batch_state import make_batches
from fastserve.compress.calibration import graph_of
from fastserve.compress.recipe import parse_recipe
from fastserve.compress.step import Context, WorkingModel
from fastserve.evaluate.bootstrap import bootstrap
from fastserve.graph.node import Value
from fastserve.hub.resolve import resolve
from report import CHECKOUT, make_parser, publish

Texts = list[list[int]]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="all-minilm-l6-v2")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3])
    parser.add_argument("--steps", nargs="+", default=["rtn", "gptq", "awq"])
    parser.add_argument("--granularity", default="group", choices=["group", "channel"])
    parser.add_argument("--shots", type=int, default=5, help="texts of a label that its centroid is made of")
    parser.add_argument("--tests", type=int, default=10, help="texts of a label that are classified")
    parser.add_argument("--calibration", type=int, default=128, help="texts")
    arguments = parser.parse_args()
    results = measure(arguments)
    rows = [(name, f"{100 * r['accuracy']['value']:.2f} %  {r['cosine']:.4f}") for name, r in results.items()]
    publish(arguments, results, rows)


def measure(arguments: Any) -> dict[str, Any]:
    path = resolve(arguments.model)
    model = WorkingModel(checkpoint=open_checkpoint(path))
    centroids, tests, calibration = split(model, arguments)
    base = [embed(model, texts) for texts in (centroids[0], tests[0])]
    results = {"float32": judge(base, base, centroids[1], tests[1])}
    for bits in arguments.bits:
        for name in arguments.steps:
            options = {"bits": bits, "granularity": arguments.granularity}
            step = parse_recipe({"steps": [{name: options}]}, name="bench").steps[0].step
            with tempfile.TemporaryDirectory() as folder:
                context = Context(source=path, scratch=Path(folder), calibration=calibration, threads=1)
                start = time.perf_counter()
                quantized = step.run(model, context)
                seconds = time.perf_counter() - start
                vectors = [embed(quantized, texts) for texts in (centroids[0], tests[0])]
            result = judge(base, vectors, centroids[1], tests[1]) | {"seconds": seconds}
            results[f"{bits} bits, {arguments.granularity}: {name}"] = result
            print(bits, name, json.dumps(result), flush=True)
    return results


def split(
    model: WorkingModel, arguments: Any
) -> tuple[tuple[Texts, NDArray[Any]], tuple[Texts, NDArray[Any]], Texts]:
    """Token ids and labels of texts for centroids and for tests, and token ids for calibration."""
    data = Path(os.environ.get("FASTSERVE_TEST_DATA", CHECKOUT.parent / "shared" / "data"))
    with (data / "cls_banking77" / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    tokenizer = Tokenizer.from_checkpoint(model.checkpoint)
    by_label: dict[str, list[list[int]]] = {}
    for row in rows:
        by_label.setdefault(row["category"], []).append(tokenizer.encode(row["text"]))
    shots, tests = arguments.shots, arguments.tests
    parts = []
    for begin, end in ((0, shots), (shots, shots + tests)):
        texts = [ids for every in by_label.values() for ids in every[begin:end]]
        labels = [label for label, every in enumerate(by_label.values()) for _ in every[begin:end]]
        parts.append((texts, np.array(labels)))
    others = [ids for every in by_label.values() for ids in every[shots + tests :]]
    chosen = np.random.default_rng(0).choice(len(others), arguments.calibration, replace=False)
    return parts[0], parts[1], [others[index] for index in chosen]


@torch.no_grad()
def embed(model: WorkingModel, texts: Texts) -> torch.Tensor:
    """Of length 1: [texts, width]."""
    graph = graph_of(model)
    parameters = {parameter for node in graph.nodes for parameter in node.parameters()}
    weights = {p: torch.from_numpy(to_f32(model.tensors[p.names[0]])) for p in parameters}
    found = []
    for batch in make_batches(texts):
        values: dict[Value, torch.Tensor] = {}
        step = batch.step(graph.nodes, weights, values)
        for node in graph.nodes:
            OPS[type(node)](node, step)
        found.append(values[graph.outputs["embedding"]])
    return torch.nn.functional.normalize(torch.cat(found), dim=1)


def judge(
    base: list[torch.Tensor], vectors: list[torch.Tensor], of_shots: NDArray[Any], of_tests: NDArray[Any]
) -> dict[str, Any]:
    """Accuracy by a bootstrap over texts, and the mean cosine to float32's embeddings."""
    centroids = torch.stack([vectors[0][of_shots == label].mean(0) for label in range(of_shots.max() + 1)])
    scores = vectors[1] @ torch.nn.functional.normalize(centroids, dim=1).T
    is_right = scores.argmax(1).numpy() == of_tests
    found = bootstrap(
        lambda rows: {"accuracy": float(is_right[rows].mean())}, len(is_right), resamples=1000, seed=0
    )
    return {
        "accuracy": found["accuracy"].to_json(),
        "cosine": float((vectors[1] * base[1]).sum(1).mean()),
    }


if __name__ == "__main__":
    main()
