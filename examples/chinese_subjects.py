"""Tell the subject of a Chinese abstract: classes in Chinese, text without spaces.

    python examples/chinese_subjects.py --train train.tsv --dev dev.tsv --output my-subjects
    python examples/chinese_subjects.py --rows 16 --epochs 1    # on titles that it makes up

An encoder that was pretrained on Chinese does better than the small English one that is the default here
because the package index has it: name yours with --model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from fastserve import pipeline
from fastserve.tune import TuneOptions, tune

TITLES = {
    "数学": ("矩阵的特征值与特征向量", "关于素数分布的一个定理", "微分方程的数值解"),
    "医学": ("心脏病人的护理", "一种新药的临床研究", "儿童肺炎的治疗"),
    "农学": ("水稻产量与施肥", "小麦抗旱品种的选育", "土壤中的水分"),
}


def made_up_rows(folder: Path, name: str, numbers: range) -> Path:
    path = folder / f"{name}.jsonl"
    subjects = list(TITLES)
    with path.open("w", encoding="utf-8") as file:
        for i in numbers:
            subject = subjects[i % 3]
            row = {"text": f"{TITLES[subject][i // 3 % 3]}（{i}）", "label": subject}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="all-minilm-l6-v2")
    parser.add_argument("--train", type=Path)
    parser.add_argument("--dev", type=Path)
    parser.add_argument("--rows", type=int, default=60, help="to make up, where no file is given")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        train = given.train or made_up_rows(Path(folder), "train", range(given.rows))
        dev = given.dev or made_up_rows(Path(folder), "dev", range(given.rows, given.rows + 9))
        output = given.output or Path(folder) / "model"
        # Subjects are not equally common: each is to count as much, in the loss and in the metric.
        options = TuneOptions(epochs=given.epochs, metric="f1", class_weights="balanced", max_length=256)
        result = tune(
            "text-classification", model=given.model, train=train, dev=dev, output=output, options=options
        )
        print(f"macro F1 of the dev rows: {result.metrics['f1']:.3f}")
        with pipeline("text-classification", output) as classify:
            print(classify("水稻的施肥")["label"])


if __name__ == "__main__":
    main()
