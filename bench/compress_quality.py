"""What quantization costs a language model: perplexity on wikitext-2 (valid) by method and grid.

Windows are of the first half of the text, the same for all, and calibration of the second. Weights are what
methods give, dequantized; activations are float32, but for W8A8, where each token's are rounded to int8.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastserve.compress.calibration import calibration_tokens
from fastserve.compress.recipe import parse_recipe
from fastserve.compress.step import Context, WorkingModel
from fastserve.evaluate.bootstrap import bootstrap
from fastserve.evaluate.language_model import LanguageModel, read_windows
from fastserve.hub.resolve import resolve
from report import CHECKOUT, DEFAULT_MODEL, make_parser, publish

GRIDS = {
    "4 bits, groups of 64": {"bits": 4, "group_size": 64},
    "4 bits, rows": {"bits": 4, "granularity": "channel"},
    "3 bits, groups of 64": {"bits": 3, "group_size": 64},
    "3 bits, rows": {"bits": 3, "granularity": "channel"},
    "8 bits, rows": {"bits": 8},
}
METHODS: dict[str, dict[str, Any]] = {
    "rtn-plain": {"step": "rtn", "scale_search": False},
    "rtn": {"step": "rtn"},
    "gptq-plain": {"step": "gptq", "scale_search": False},
    "gptq": {"step": "gptq"},
    "awq": {"step": "awq"},
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--grids", nargs="+", default=list(GRIDS)[:4], choices=list(GRIDS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
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
    return f"{value:+7.2%} ({low:+.2%} .. {high:+.2%}), {result['seconds']:.0f} s"


def measure(arguments: Any) -> dict[str, Any]:
    path = Path(arguments.model) if Path(arguments.model).exists() else resolve(arguments.model)
    checkpoint = open_checkpoint(path)
    with tempfile.TemporaryDirectory() as folder:
        evaluated, calibrated = split_text(Path(folder))
        windows = read_windows(checkpoint, evaluated, length=arguments.window_tokens, most=arguments.windows)
        calibration = calibration_tokens(
            checkpoint, calibrated, num_sequences=arguments.sequences, length=arguments.length, seed=0
        )
        model = WorkingModel(checkpoint=checkpoint)
        base = losses_of(checkpoint, windows, arguments.threads)
        results: dict[str, Any] = {"float32": {"perplexity": perplexity(base)}}
        for grid in arguments.grids:
            for method in arguments.methods:
                options = {**METHODS[method], **GRIDS[grid]}
                step = options.pop("step")
                recipe = parse_recipe({"steps": [{step: options}]}, name="bench")
                context = Context(
                    source=path,
                    scratch=Path(folder) / f"{grid} {method}",
                    calibration=calibration,
                    threads=arguments.threads,
                )
                start = time.perf_counter()
                quantized = recipe.steps[0].step.run(model, context)
                seconds = time.perf_counter() - start
                losses = losses_of(quantized.checkpoint, windows, arguments.threads)
                results[f"{grid}: {method}"] = result = {
                    **compare(base, losses),
                    "seconds": seconds,
                    "mean_layer_error": float(np.mean([layer.relative_error for layer in context.layers])),
                }
                print(f"{grid}: {method}", json.dumps(result), flush=True)
    return results


def split_text(folder: Path) -> tuple[Path, Path]:
    """The first half of the text, to evaluate on, and the second, to calibrate on."""
    data = Path(os.environ.get("FASTSERVE_TEST_DATA", CHECKOUT.parent / "shared" / "data"))
    lines = (data / "lm_wikitext2" / "valid.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    halves = folder / "evaluated.txt", folder / "calibrated.txt"
    for half, part in zip(halves, (lines[: len(lines) // 2], lines[len(lines) // 2 :]), strict=True):
        half.write_text("".join(part), encoding="utf-8")
    return halves


def losses_of(checkpoint: Checkpoint, windows: Sequence[Sequence[int]], threads: int) -> NDArray[np.float64]:
    """Of each window, the sum of its tokens' losses and their number: [windows, 2]."""
    model = LanguageModel(checkpoint, weights="f32", kv_dtype="f32", threads=threads)
    return np.array([(losses.sum(), len(losses)) for losses in map(model.losses, windows)])


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
