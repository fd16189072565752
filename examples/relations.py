"""Find the relation between two entities of a sentence, which stand between markers for the model.

    python examples/relations.py --train TRAIN_FILE.TXT --output my-relations
    python examples/relations.py --rows 16 --epochs 1      # on sentences that it makes up

Files hold rows such as {"text": ..., "head": {"start": 0, "end": 3}, "tail": {...}, "label": "born-in"}, or
SemEval-2010's marked sentences.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from fastserve import pipeline
from fastserve.tune import TuneOptions, tune

PEOPLE, PLACES = ("Ada", "Grace", "Alan", "Emmy"), ("London", "New York", "Erlangen")
VERBS = {"born-in": "was born in", "works-in": "worked in"}


def made_up_row(i: int) -> dict:
    person, place = PEOPLE[i % 4], PLACES[i % 3]
    label = list(VERBS)[i % 2]
    text = f"{person} {VERBS[label]} {place} in {1900 + i}."
    head = {"start": 0, "end": len(person)}
    tail = {"start": text.index(place), "end": text.index(place) + len(place)}
    return {"text": text, "head": head, "tail": tail, "label": label}


def made_up_rows(folder: Path, name: str, numbers: range) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(made_up_row(i)) + "\n" for i in numbers), encoding="utf-8")
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
        dev = given.dev or (
            None if given.train else made_up_rows(Path(folder), "dev", range(given.rows, given.rows + 12))
        )
        output = given.output or Path(folder) / "model"
        options = TuneOptions(epochs=given.epochs, max_length=128)
        result = tune(
            "relation-extraction", model=given.model, train=train, dev=dev, output=output, options=options
        )
        print({name: round(value, 3) for name, value in result.metrics.items()})
        row = made_up_row(0)
        with pipeline("relation-extraction", output) as relate:
            print(row["text"], relate(row["text"], row["head"], row["tail"])["label"])


if __name__ == "__main__":
    main()
