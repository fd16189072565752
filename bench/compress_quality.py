"""What quantization costs a language model: perplexity on wikitext-2 (valid) by method and grid.

Windows are of the first half of the text, the same for all, and calibration of the second. Weights are what
methods give, dequantized; activations are float32, but for W8A8, where each token's are rounded to int8.
`qat` learns from the model's own probabilities on paragraphs of the half that calibrates.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastserve.backends.torch.ops import OPS
from fastserve.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.compress.batch_state import make_batches
from fastserve.compress.calibration import calibration_tokens, graph_of
from fastserve.compress.recipe import parse_recipe
from fastserve.compress.step import Context, Step, Targets, WorkingModel
from fastserve.evaluate.bootstrap import bootstrap
from fastserve.evaluate.language_model import LanguageModel, read_windows
from fastserve.graph.node import Linear, Value
from fastserve.hub.resolve import resolve
from report import CHECKOUT, DEFAULT_MODEL, make_parser, publish

GRIDS = {
    "4 bits, groups of 64": {"bits": 4, "group_size": 64},
    "4 bits, rows": {"bits": 4, "granularity": "channel"},
    "3 bits, groups of 64": {"bits": 3, "group_size": 64},
    "3 bits, rows": {"bits": 3, "granularity": "channel"},
    "8 bits, rows": {"bits": 8},
    "2 bits, rows": {"bits": 2, "granularity": "channel"},
}
# Weights and activations of int8, without and with smoothing.
W8A8: dict[str, list[Any]] = {
    "rtn": [{"rtn": {"bits": 8}}],
    "smoothquant 0.5": [{"smoothquant": {"alpha": 0.5}}],
    "smoothquant 0.8": [{"smoothquant": {"alpha": 0.8}}],
}
METHODS: dict[str, dict[str, Any]] = {
    "rtn-plain": {"step": "rtn", "scale_search": False},
    "rtn": {"step": "rtn"},
    "gptq-plain": {"step": "gptq", "scale_search": False},
    "gptq": {"step": "gptq"},
    "awq": {"step": "awq"},
    "gptq, in order": {"step": "gptq", "act_order": False},
    "qat": {
        "step": "qat",
        "distil": True,
        "tune": {
            "device": "cpu",
            "epochs": 1,
            "learning_rate": 1e-3,
            "max_length": 256,
            "soft_weight": 1.0,
            "soft_temperature": 1.0,
        },
    },
}
_LEAST_WORDS, _MOST_CHARACTERS = 21, 700  # of a paragraph that is learned


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--grids", nargs="*", default=list(GRIDS)[:4], choices=list(GRIDS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS)[:6], choices=list(METHODS))
    parser.add_argument("--w8a8", nargs="*", default=[], choices=list(W8A8), help="both of int8, by these")
    parser.add_argument("--folder", type=Path, help="and a model that was compressed elsewhere")
    parser.add_argument("--kv", action="store_true", help="and keys and values of int8")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=64, help="of calibration")
    parser.add_argument("--length", type=int, default=256, help="of a sequence of calibration, in tokens")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    results = measure(arguments)
    rows = [(name, f"{result['perplexity']:8.3f}  {describe(result)}") for name, result in results.items()]
    publish(arguments, results, rows)


def describe(result: dict[str, Any]) -> str:
    if "increase" not in result:
        return ""
    value, low, high = (result["increase"][key] for key in ("value", "low", "high"))
    return f"{value:+7.2%} ({low:+.2%} .. {high:+.2%}), {result.get('seconds', 0):.0f} s"


class Bench:
    """A model, the windows that it is judged on, and what is found."""

    def __init__(self, arguments: Any, folder: Path) -> None:
        self.path = Path(arguments.model) if Path(arguments.model).exists() else resolve(arguments.model)
        self.folder = folder
        self.threads = arguments.threads
        self.train = folder / "train.jsonl"
        checkpoint = open_checkpoint(self.path)
        self.model = WorkingModel(checkpoint=checkpoint)
        evaluated, calibrated = split_text(folder)
        self.windows = read_windows(
            checkpoint, evaluated, length=arguments.window_tokens, most=arguments.windows
        )
        self.calibration = calibration_tokens(
            checkpoint, calibrated, num_sequences=arguments.sequences, length=arguments.length, seed=0
        )
        write_paragraphs(calibrated, self.train)
        self.base = self.losses(checkpoint)
        self.results: dict[str, Any] = {"float32": {"perplexity": perplexity(self.base)}}

    def compress(self, steps: list[Step]) -> tuple[WorkingModel, dict[str, float]]:
        """The model after some steps; the time, and the mean error of a matrix."""
        context = Context(
            source=self.path,
            scratch=Path(tempfile.mkdtemp(dir=self.folder)),
            calibration=self.calibration,
            threads=self.threads,
            train=self.train,
        )
        start = time.perf_counter()
        model = self.model
        for step in steps:
            model = step.run(model, context)
        seconds = time.perf_counter() - start
        error = float(np.mean([layer.relative_error for layer in context.layers]))
        return model, {"seconds": seconds, "mean_layer_error": error}

    def losses(
        self, checkpoint: Checkpoint, *, weights: Any = "f32", kv_dtype: Any = "f32"
    ) -> NDArray[np.float64]:
        """Of each window, the sum of its tokens' losses and their number: [windows, 2]."""
        model = LanguageModel(checkpoint, weights=weights, kv_dtype=kv_dtype, threads=self.threads)
        return np.array([(losses.sum(), len(losses)) for losses in map(model.losses, self.windows)])

    def losses_by_tokens(self, model: WorkingModel) -> NDArray[np.float64]:
        """The same where linears that meet int8 round what they multiply with, each token with its scale."""
        graph = graph_of(model)
        parameters = {parameter for node in graph.nodes for parameter in node.parameters()}
        weights = {p: torch.from_numpy(to_f32(model.tensors[p.names[0]])) for p in parameters}
        found = []
        for window in self.windows:
            (batch,) = make_batches([window])
            values: dict[Value, torch.Tensor] = {}
            step = batch.step(graph.nodes, weights, values)
            for node in graph.nodes:
                if isinstance(node, Linear) and node.weight.names[0] in model.int8_activations:
                    plain = values[node.x]
                    scales = plain.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
                    values[node.x] = (plain / scales).round() * scales
                    OPS[Linear](node, step)
                    values[node.x] = plain
                else:
                    OPS[type(node)](node, step)
            log_probs = values[graph.outputs["logits"]].log_softmax(1)[:-1]
            targets = torch.tensor(window[1:])
            found.append((-float(log_probs.gather(1, targets[:, None]).sum()), len(targets)))
        return np.array(found)

    def note(self, name: str, losses: NDArray[np.float64], **more: float) -> None:
        self.results[name] = {**compare(self.base, losses), **more}
        print(name, json.dumps(self.results[name]), flush=True)


def measure(arguments: Any) -> dict[str, Any]:
    weights = {
        f"{grid}: {method}": read_steps([{METHODS[method]["step"]: {**options_of(method), **GRIDS[grid]}}])
        for grid in arguments.grids
        for method in arguments.methods
    }
    w8a8 = {name: read_steps(W8A8[name]) for name in arguments.w8a8}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, Path(folder))
        for name, steps in weights.items():
            model, figures = bench.compress(steps)
            bench.note(name, bench.losses(model.checkpoint), **figures)
        for name, steps in w8a8.items():
            measure_w8a8(bench, name, steps)
        if arguments.kv:
            bench.note("keys and values of int8", bench.losses(bench.model.checkpoint, kv_dtype="int8"))
        if arguments.folder is not None:
            bench.note(f"folder {arguments.folder.name}", bench.losses(open_checkpoint(arguments.folder)))
        return bench.results


def options_of(method: str) -> dict[str, Any]:
    return {name: value for name, value in METHODS[method].items() if name != "step"}


def read_steps(steps: list[Any]) -> list[Step]:
    return [named.step for named in parse_recipe({"steps": steps}, name="bench").steps]


def measure_w8a8(bench: Bench, name: str, steps: list[Step]) -> None:
    """With a scale for each token, as the format says, and as the runtime computes it."""
    model, figures = bench.compress(steps)
    everywhere = replace(model, int8_activations=frozenset(model.matrices(Targets())))
    bench.note(f"W8A8, tokens: {name}", bench.losses_by_tokens(everywhere), **figures)
    bench.note(f"W8A8, runtime: {name}", bench.losses(model.checkpoint, weights="int8"), **figures)


def split_text(folder: Path) -> tuple[Path, Path]:
    """The first half of the text, to evaluate on, and the second, to calibrate on."""
    data = Path(os.environ.get("FASTSERVE_TEST_DATA", CHECKOUT.parent / "shared" / "data"))
    lines = (data / "lm_wikitext2" / "valid.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    halves = folder / "evaluated.txt", folder / "calibrated.txt"
    for half, part in zip(halves, (lines[: len(lines) // 2], lines[len(lines) // 2 :]), strict=True):
        half.write_text("".join(part), encoding="utf-8")
    return halves


def write_paragraphs(text: Path, rows: Path) -> None:
    """The longer lines of a text as rows."""
    lines = (line.strip() for line in text.read_text(encoding="utf-8").splitlines())
    chosen = [line[:_MOST_CHARACTERS] for line in lines if len(line.split()) >= _LEAST_WORDS]
    rows.write_text("".join(f"{json.dumps({'text': line})}\n" for line in chosen), encoding="utf-8")


def perplexity(losses: NDArray[np.float64]) -> float:
    total, count = losses.sum(axis=0)
    return float(np.exp(total / count))


def compare(base: NDArray[np.float64], losses: NDArray[np.float64]) -> dict[str, Any]:
    """Perplexity, and its increase over float32's, by a bootstrap over windows."""
    found = bootstrap(
        lambda rows: {"increase": perplexity(losses[rows]) / perplexity(base[rows]) - 1},
        len(base),
        resamples=1000,
        seed=0,
    )
    return {"perplexity": perplexity(losses), "increase": found["increase"].to_json()}


if __name__ == "__main__":
    main()
