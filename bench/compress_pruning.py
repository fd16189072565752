"""What pruning costs a language model: perplexity on wikitext-2 (valid) by method and pattern, at 50 %.

Windows and calibration text are those of `compress_quality.py`. Nothing is tuned after; weights stay floats.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from compress_quality import compare, losses_of, perplexity, split_text
from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.compress.calibration import calibration_tokens
from fastserve.compress.recipe import parse_recipe
from fastserve.compress.step import Context, WorkingModel
from fastserve.evaluate.language_model import read_windows
from fastserve.hub.resolve import resolve
from report import DEFAULT_MODEL, make_parser, publish

METHODS = ("magnitude", "wanda", "sparsegpt")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--patterns", nargs="+", default=["unstructured", "2:4"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=64, help="of calibration")
    parser.add_argument("--length", type=int, default=256, help="of a sequence of calibration, in tokens")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    results = measure(arguments)
    rows: list[tuple[str, object]] = []
    for name, result in results.items():
        more = result.get("increase")
        interval = f"{more['value']:+.1%} ({more['low']:+.1%} .. {more['high']:+.1%})" if more else ""
        rows.append((name, f"{result['perplexity']:9.2f}  {interval}"))
    publish(arguments, results, rows)


def measure(arguments: Any) -> dict[str, Any]:
    path = Path(arguments.model) if Path(arguments.model).exists() else resolve(arguments.model)
    checkpoint = open_checkpoint(path)
    with tempfile.TemporaryDirectory() as folder:
        evaluated, calibrated = split_text(Path(folder))
        windows = read_windows(checkpoint, evaluated, length=arguments.window_tokens, most=arguments.windows)
        calibration = calibration_tokens(
            checkpoint, calibrated, num_sequences=arguments.sequences, length=arguments.length, seed=0
        )
        base = losses_of(checkpoint, windows, arguments.threads)
        results: dict[str, Any] = {"whole": {"perplexity": perplexity(base)}}
        for pattern in arguments.patterns:
            for method in arguments.methods:
                options = {"pattern": pattern} if ":" in pattern else {"pattern": pattern, "sparsity": 0.5}
                recipe = parse_recipe({"steps": [{method: options}]}, name="bench")
                context = Context(
                    source=path,
                    scratch=Path(folder) / f"{pattern} {method}",
                    calibration=calibration,
                    threads=arguments.threads,
                )
                start = time.perf_counter()
                pruned = recipe.steps[0].step.run(WorkingModel(checkpoint=checkpoint), context)
                seconds = time.perf_counter() - start
                losses = losses_of(pruned.checkpoint, windows, arguments.threads)
                results[f"{pattern}, {method}"] = {**compare(base, losses), "seconds": seconds}
                print(f"{pattern}, {method}", json.dumps(results[f"{pattern}, {method}"]), flush=True)
    return results


if __name__ == "__main__":
    main()
