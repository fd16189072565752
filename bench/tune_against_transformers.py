"""`fastserve tune` beside a plain script on `transformers`, with the same settings, rows and seeds.

    python bench/tune_against_transformers.py --data shared/data --sets sms wnut17 --seeds 3

The script is a loop as tutorials write it: rows shuffled anew each epoch, padded to the longest of their
batch, AdamW, a linear schedule with warm-up, the last weights. Both are scored by the same code on the same
dev rows; fastserve's weights are the last ones too (no choice by the dev rows). Prints a table, and writes
bench/results/tune/NAME.json.

Sets: `sms` (SMS spam, every tenth row is dev), `polarity` (sentence polarity, 4,000 rows to train, 1,000
dev), `banking77` (77 intents, 4,000 and 1,000), `wnut17` (entities, all rows), `semeval` (SemEval-2010 task
8, 6,500 and 1,500).
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "tune"
Rows = list[dict[str, Any]]


def read_sms(data: Path) -> tuple[str, Rows]:
    lines = (data / "cls_sms_spam" / "sms.tsv").read_text("utf-8").splitlines()
    return "text-classification", [
        {"text": text, "label": label} for label, text in (line.split("\t", 1) for line in lines)
    ]


def read_polarity(data: Path) -> tuple[str, Rows]:
    rows = []
    for label in ("neg", "pos"):
        text = (data / "cls_sentence_polarity" / f"rt-polarity.{label}").read_text("latin-1")
        rows += [{"text": line.strip(), "label": label} for line in text.split("\n") if line.strip()]
    return "text-classification", rows


def read_banking77(data: Path) -> tuple[str, Rows]:
    with (data / "cls_banking77" / "train.csv").open(encoding="utf-8", newline="") as file:
        return "text-classification", [
            {"text": row["text"], "label": row["category"]} for row in csv.DictReader(file)
        ]


def read_wnut17(data: Path, part: str = "train") -> tuple[str, Rows]:
    from fastserve.data import load_data

    rows = load_data(data / "ner_wnut17" / f"{part}.conll", "token-classification")
    return "token-classification", [{"tokens": row["tokens"], "tags": row["tags"]} for row in rows]


def read_semeval(data: Path) -> tuple[str, Rows]:
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
    return "relation-extraction", rows


READERS: dict[str, tuple[Callable[[Path], tuple[str, Rows]], int | None, int | None]] = {
    "sms": (read_sms, None, None),
    "polarity": (read_polarity, 4000, 1000),
    "banking77": (read_banking77, 4000, 1000),
    "wnut17": (read_wnut17, None, None),
    "semeval": (read_semeval, 6500, 1500),
}
METRICS = {"text-classification": "accuracy", "token-classification": "f1", "relation-extraction": "f1"}


def split(name: str, data: Path, limit: int | None) -> tuple[str, Rows, Rows]:
    """Training and dev rows; the split is the same for all seeds."""
    reader, num_train, num_dev = READERS[name]
    task, rows = reader(data)
    if name == "wnut17":
        dev = read_wnut17(data, "dev")[1]
    else:
        random.Random(0).shuffle(rows)
        num_dev = num_dev or len(rows) // 10
        dev, rows = rows[:num_dev], rows[num_dev:]
    return task, rows[: limit or num_train], dev[: limit and limit // 2]


def run_script(
    task_name: str, model_path: Path, train: Rows, dev: Rows, seed: int, settings: argparse.Namespace
) -> float:
    """The plain loop. Returns the metric of the dev rows."""
    import torch
    import transformers
    from torch.utils.data import DataLoader

    from fastserve.evaluate.task.collate import collate
    from fastserve.evaluate.task.table import TaskOptions, make_task
    from fastserve.evaluate.torch_model import run_examples

    transformers.set_seed(seed)
    task = make_task(task_name, train, TaskOptions(max_length=settings.max_length))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    kind = getattr(transformers, f"AutoModel{task.model_class}")
    model = kind.from_pretrained(model_path, **task.config())
    if task_name == "relation-extraction":
        tokenizer.add_tokens(["[E1]", "[/E1]", "[E2]", "[/E2]"], special_tokens=True)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    examples = task.encode(train, tokenizer, with_labels=True)

    def batch(features: Rows) -> dict[str, Any]:
        arrays = collate(features, pad_token_id=tokenizer.pad_token_id)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    loader = DataLoader(examples.features, batch_size=settings.batch_size, shuffle=True, collate_fn=batch)
    num_steps = len(loader) * settings.epochs
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, int(0.06 * num_steps), num_steps)
    model.train()
    for _ in range(settings.epochs):
        for inputs in loader:
            model(**inputs).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    encoded = task.encode(dev, tokenizer, with_labels=False)
    logits, _ = run_examples(model, encoded.features, pad_token_id=tokenizer.pad_token_id, batch_size=32)
    return task.score(dev, task.decode(dev, encoded, logits)).metrics[METRICS[task_name]]


def run_fastserve(
    task_name: str, model: str, train: Rows, dev: Rows, seed: int, settings: argparse.Namespace
) -> float:
    from fastserve.evaluate.task_evaluation import evaluate_folder
    from fastserve.tune import TuneOptions, tune

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in train), encoding="utf-8")
        options = TuneOptions(
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            max_length=settings.max_length,
            seed=seed,
        )
        result = tune(task_name, model=model, train=path, output=Path(folder) / "model", options=options)
        from fastserve.evaluate.prediction import PredictorOptions

        evaluation = evaluate_folder(result.path, dev, PredictorOptions(weights="f32", truncate=True))
        return evaluation.scores.metrics[METRICS[task_name]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--sets", nargs="+", choices=list(READERS), default=list(READERS))
    parser.add_argument("--model", default="all-minilm-l6-v2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--limit", type=int, help="so many training rows, and half as many dev rows")
    settings = parser.parse_args()

    from fastserve.hub.resolve import resolve

    model_path = resolve(settings.model)
    print("set | metric | rows | script | fastserve | difference | seconds (script, fastserve)")
    for name in settings.sets:
        task, train, dev = split(name, settings.data, settings.limit)
        figures: dict[str, list[float]] = {
            "script": [],
            "fastserve": [],
            "script_seconds": [],
            "fastserve_seconds": [],
        }
        for seed in range(settings.seeds):
            for side in ("script", "fastserve"):
                started = time.monotonic()
                if side == "script":
                    value = run_script(task, model_path, train, dev, seed, settings)
                else:
                    value = run_fastserve(task, settings.model, train, dev, seed, settings)
                figures[side].append(value)
                figures[f"{side}_seconds"].append(time.monotonic() - started)
        means = {key: statistics.mean(values) for key, values in figures.items()}
        difference = means["fastserve"] - means["script"]
        print(
            f"{name} | {METRICS[task]} | {len(train)} + {len(dev)} | "
            f"{means['script']:.4f} | {means['fastserve']:.4f} | "
            f"{difference:+.4f} | {means['script_seconds']:.0f}, {means['fastserve_seconds']:.0f}",
            flush=True,
        )
        RESULTS.mkdir(parents=True, exist_ok=True)
        document = {
            "set": name,
            "settings": {k: str(v) for k, v in vars(settings).items() if k != "data"},
            **figures,
        }
        document |= {"num_train": len(train), "num_dev": len(dev), "metric": METRICS[task]}
        (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
