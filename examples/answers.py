"""Find the passage that answers a question, in English or Chinese, or see that there is none.

python examples/answers.py --train train.json --dev dev.json --output my-answers    # SQuAD's form
python examples/answers.py --rows 16 --epochs 1        # on contexts that it makes up
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from fastserve import pipeline
from fastserve.tune import TuneOptions, tune

PEOPLE, PLACES = ("Ada", "Grace", "Alan", "艾达"), ("London", "New York", "Paris", "北京")


def made_up_row(i: int) -> dict:
    person, place = PEOPLE[i % 4], PLACES[i // 4 % 4]
    context = f"{person} lives in {place}. On day {i} the weather was fine."
    answers = {"text": [place], "answer_start": [context.index(place)]}
    if i % 5 == 4:  # the context does not say
        answers = {"text": [], "answer_start": []}
        context = f"{person} likes music. On day {i} the weather was fine."
    return {"id": str(i), "question": f"Where does {person} live?", "context": context, "answers": answers}


def made_up_rows(folder: Path, name: str, numbers: range) -> Path:
    path = folder / f"{name}.jsonl"
    lines = [json.dumps(made_up_row(i), ensure_ascii=False) + "\n" for i in numbers]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="all-minilm-l6-v2")
    parser.add_argument("--train", type=Path)
    parser.add_argument("--dev", type=Path)
    parser.add_argument("--rows", type=int, default=64, help="to make up, where no file is given")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        train = given.train or made_up_rows(Path(folder), "train", range(given.rows))
        dev = given.dev or made_up_rows(Path(folder), "dev", range(given.rows, given.rows + 20))
        output = given.output or Path(folder) / "model"
        options = TuneOptions(epochs=given.epochs, max_length=256, stride=96)
        result = tune(
            "question-answering", model=given.model, train=train, dev=dev, output=output, options=options
        )
        print(f"F1 {result.metrics['f1']:.3f}, exact match {result.metrics['exact_match']:.3f}")
        with pipeline("question-answering", output) as answer:
            row = made_up_row(0)
            print(answer(row["question"], row["context"]))


if __name__ == "__main__":
    main()
