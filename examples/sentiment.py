"""From labelled sentences to a sentiment model that serves: tune, evaluate, predict.

    python examples/sentiment.py --train train.jsonl --dev dev.jsonl --output my-sentiment
    python examples/sentiment.py --rows 16 --epochs 1      # on sentences that it makes up

Files hold rows such as {"text": "a fine film", "label": "positive"}, in any format that `fastserve prepare`
reads.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from fastserve import pipeline
from fastserve.tune import TuneOptions, tune

GOOD, BAD = ("a fine film", "moving and funny", "a joy"), ("a dull film", "slow and cold", "a bore")


def made_up_rows(folder: Path, name: str, numbers: range) -> Path:
    path = folder / f"{name}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in numbers:
            text, label = ((GOOD, "positive"), (BAD, "negative"))[i % 2]
            file.write(json.dumps({"text": f"{text[i // 2 % 3]}, {i}", "label": label}) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="all-minilm-l6-v2")
    parser.add_argument("--train", type=Path)
    parser.add_argument("--dev", type=Path)
    parser.add_argument("--rows", type=int, default=64, help="to make up, where no file is given")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        train = given.train or made_up_rows(Path(folder), "train", range(given.rows))
        dev = given.dev or made_up_rows(Path(folder), "dev", range(given.rows, given.rows + 12))
        output = given.output or Path(folder) / "model"
        options = TuneOptions(epochs=given.epochs, metric="accuracy", max_length=64)
        result = tune(
            "text-classification", model=given.model, train=train, dev=dev, output=output, options=options
        )
        print(f"accuracy of the dev rows: {result.metrics['accuracy']:.3f}")
        with pipeline("text-classification", output) as classify:
            for text in ("what a joy to watch", "slow, cold and dull"):
                print(f"{text}: {classify(text)['label']}")


if __name__ == "__main__":
    main()
