"""The labelled sets that tuning is measured on, as rows: how each is read, split, and learned.

A split is the same for all seeds. A text that occurs twice is taken once, so that none is on both sides. No
set's official test rows are touched.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class TaskSet:
    """A set and the settings with which a small encoder learns it in minutes on one core.

    Attributes:
        read: from the folder of all sets, all rows, or those to train on and those that judge.
        num_train, num_dev: most rows of either.
        metric: the one of the task's that is compared.
    """

    task: str
    metric: str
    read: Callable[[Path], Rows | tuple[Rows, Rows]]
    num_train: int
    num_dev: int
    epochs: int = 2
    batch_size: int = 16
    learning_rate: float = 1e-4
    max_length: int = 64

    def split(self, data: Path) -> tuple[Rows, Rows]:
        """Rows to train on, and rows that judge."""
        found = self.read(data)
        if isinstance(found, tuple):
            train, dev = found
        else:
            rows = list({json.dumps(row["text"]): row for row in reversed(found)}.values())
            random.Random(0).shuffle(rows)
            dev, train = rows[: self.num_dev], rows[self.num_dev :]
        return train[: self.num_train], dev[: self.num_dev]


def read_sms(data: Path) -> Rows:
    lines = (data / "cls_sms_spam" / "sms.tsv").read_text("utf-8").splitlines()
    return [{"text": text, "label": label} for label, text in (line.split("\t", 1) for line in lines)]


def read_polarity(data: Path) -> Rows:
    rows = []
    for label in ("neg", "pos"):
        text = (data / "cls_sentence_polarity" / f"rt-polarity.{label}").read_text("latin-1")
        rows += [{"text": line.strip(), "label": label} for line in text.split("\n") if line.strip()]
    return rows


def read_banking77(data: Path) -> Rows:
    with (data / "cls_banking77" / "train.csv").open(encoding="utf-8", newline="") as file:
        return [{"text": row["text"], "label": row["category"]} for row in csv.DictReader(file)]


def read_subjects(data: Path) -> tuple[Rows, Rows]:
    """Subjects of Chinese papers by their titles."""
    train, dev = (
        [
            {"text": text, "label": label}
            for _, text, label in csv.reader(
                (data / "cls_csl_discipline_zh" / f"{part}.tsv").open(encoding="utf-8"),
                delimiter="\t",
                quoting=csv.QUOTE_NONE,
            )
        ]
        for part in ("train", "dev")
    )
    known = {row["text"] for row in dev}
    return [row for row in train if row["text"] not in known], dev


def read_wnut17(data: Path) -> tuple[Rows, Rows]:
    from fastserve.data import load_data

    train, dev = (
        [
            {"tokens": row["tokens"], "tags": row["tags"]}
            for row in load_data(data / "ner_wnut17" / f"{part}.conll", "token-classification")
        ]
        for part in ("train", "dev")
    )
    return train, dev


def read_semeval(data: Path) -> Rows:
    lines = (data / "re_semeval2010_task8" / "TRAIN_FILE.TXT").read_text("utf-8").splitlines()
    rows = []
    for number in range(0, len(lines) - 1, 4):
        marked = lines[number].split("\t", 1)[1].strip().strip('"')
        spans, text = {}, marked
        for name, mark in (("head", "e1"), ("tail", "e2")):
            inner = re.search(rf"<{mark}>(.*?)</{mark}>", text)
            assert inner is not None
            other = re.sub(r"</?e[12]>", "", text[: inner.start()])
            spans[name] = {"start": len(other), "end": len(other) + len(inner[1])}
        rows.append({"text": re.sub(r"</?e[12]>", "", marked), **spans, "label": lines[number + 1].strip()})
    return rows


def read_xquad(data: Path) -> tuple[Rows, Rows]:
    return _read_answers(data / "qa_xquad" / "xquad.en.train.json")


def read_cmrc(data: Path) -> tuple[Rows, Rows]:
    return _read_answers(data / "qa_cmrc2018" / "cmrc2018_trial.json", longest=400)


def _read_answers(path: Path, longest: int | None = None) -> tuple[Rows, Rows]:
    """Questions of some contexts to train on, of others to judge: every third context is for judging. Answers
    that are not where the file says are left out, and contexts of more than `longest` characters."""
    from fastserve.data import load_data

    train: Rows = []
    dev: Rows = []
    contexts: dict[str, int] = {}
    for row in load_data(path, "question-answering", on_problem={"answer-offset": "drop"}):
        if longest is not None and len(row["context"]) > longest:
            continue
        number = contexts.setdefault(row["context"], len(contexts))
        kept = {name: row[name] for name in ("context", "question", "answers")}
        (dev if number % 3 == 2 else train).append(kept)
    random.Random(0).shuffle(train)
    random.Random(0).shuffle(dev)
    return train, dev


SETS = {
    "sms": TaskSet("text-classification", "accuracy", read_sms, 2500, 600),
    "polarity": TaskSet("text-classification", "accuracy", read_polarity, 800, 500, learning_rate=2e-4),
    "banking77": TaskSet(
        "text-classification", "accuracy", read_banking77, 1200, 500, epochs=3, learning_rate=4e-4
    ),
    "wnut17": TaskSet("token-classification", "f1", read_wnut17, 800, 400, learning_rate=2e-4),
    "semeval": TaskSet(
        "relation-extraction", "f1", read_semeval, 1600, 500, epochs=3, batch_size=8, learning_rate=2e-4
    ),
    "subjects": TaskSet("text-classification", "accuracy", read_subjects, 600, 400, learning_rate=2e-4),
    "xquad": TaskSet(
        "question-answering", "f1", read_xquad, 120, 60, learning_rate=2e-4, max_length=256, batch_size=8
    ),
    "cmrc": TaskSet(
        "question-answering", "f1", read_cmrc, 120, 60, learning_rate=2e-4, max_length=416, batch_size=8
    ),
}
