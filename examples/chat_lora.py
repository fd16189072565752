"""Teach a small chat model a way to answer, with LoRA; its GGUF file is dequantized first.

    python examples/chat_lora.py --train conversations.jsonl --output my-chat
    python examples/chat_lora.py --rows 4 --steps 2        # on conversations that it makes up

Files hold rows {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}. What
is learned is the answers alone, between the marks of the model's own chat template.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from fastserve import LLM, SamplingParams
from fastserve.tune import TuneOptions, tune


def made_up_rows(folder: Path, count: int) -> Path:
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            messages = [
                {"role": "user", "content": f"What is {i} plus {i + 1}?"},
                {"role": "assistant", "content": f"Aye, {2 * i + 1} it be!"},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--train", type=Path)
    parser.add_argument("--rows", type=int, default=48, help="to make up, where no file is given")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        train = given.train or made_up_rows(Path(folder), given.rows)
        output = given.output or Path(folder) / "model"
        options = TuneOptions(max_steps=given.steps, batch_size=4, method="lora", rank=16, max_length=256)
        result = tune("dialogue", model=given.model, train=train, output=output, options=options)
        print(f"{result.num_steps} steps in {result.seconds:.0f} s")
        llm = LLM(output)
        question = [{"role": "user", "content": "What is 5 plus 6?"}]
        print(llm.chat(question, SamplingParams(max_tokens=24)).text)


if __name__ == "__main__":
    main()
