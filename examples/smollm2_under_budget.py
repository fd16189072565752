"""A language model under a budget of size, quality and time, which recipes and mixtures of them are held to.

    python examples/smollm2_under_budget.py --text FILE --output smollm2-small
    python examples/smollm2_under_budget.py --text FILE --budget "size<=90MB quality>=-15%" --trials 4

The first half of the text judges, the second calibrates. Needs fastserve-llm[compress]; takes some five
minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from fastserve import LLM, SamplingParams
from fastserve.compress import CompressData, compress_to_budget
from fastserve.compress.report import SEARCH_HEADER, search_rows

GPTQ4 = """
description: linears to int4 by GPTQ, 64 columns a scale; int8 tables
calibration: {sequences: %d, length: 256}
steps:
  - gptq: {bits: 4, group_size: 64, misfit: channel}
  - rtn: {bits: 8, targets: {linears: false, tables: true}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--budget", default="size<=110MB quality>=-8% decode<=12ms")
    parser.add_argument("--sequences", type=int, default=32, help="of 256 tokens, to calibrate on")
    parser.add_argument("--limit", type=int, default=8, help="windows of 512 tokens, to judge by")
    parser.add_argument("--trials", type=int, default=2, help="mixtures to measure")
    parser.add_argument("--output", type=Path, default=Path("smollm2-small"))
    given = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = given.text.read_text(encoding="utf-8").splitlines(keepends=True)
        judged, calibration = folder / "judged.txt", folder / "calibration.txt"
        judged.write_text("".join(lines[: len(lines) // 2]), encoding="utf-8")
        calibration.write_text("".join(lines[len(lines) // 2 :]), encoding="utf-8")
        recipe = folder / "gptq4.yaml"
        recipe.write_text(GPTQ4 % given.sequences, encoding="utf-8")
        result = compress_to_budget(
            given.model,
            output=given.output,
            budget=given.budget,
            data=CompressData(calibration=calibration, judged=judged),
            recipes=["int8-all", recipe],
            trials=given.trials,
            limit=given.limit,
        )
    for row in [SEARCH_HEADER, *search_rows(result.report)]:
        print(" | ".join(row))
    if result.path is None:
        sys.exit("nothing that was tried keeps the budget")
    with LLM(result.path) as llm:
        print(llm.generate("Gravity is", SamplingParams(max_tokens=24))[0].text)


if __name__ == "__main__":
    main()
