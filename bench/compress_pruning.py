"""What pruning costs a language model: perplexity on wikitext-2 (valid) by method and pattern, at 50 %.

Windows and calibration text are those of `compress_quality.py`. Nothing is tuned after; weights stay floats.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from compress_quality import Bench, describe, read_steps
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
    rows = [(name, f"{result['perplexity']:9.2f}  {describe(result)}") for name, result in results.items()]
    publish(arguments, results, rows)


def measure(arguments: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, Path(folder))
        for pattern in arguments.patterns:
            options = {"pattern": pattern} if ":" in pattern else {"pattern": pattern, "sparsity": 0.5}
            for method in arguments.methods:
                model, figures = bench.compress(read_steps([{method: options}]))
                bench.note(f"{pattern}, {method}", bench.losses(model.checkpoint), **figures)
        return bench.results


if __name__ == "__main__":
    main()
