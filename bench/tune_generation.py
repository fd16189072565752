"""Does a tuned model write better than one that copies what it reads?

    python bench/tune_generation.py --data shared/data --cases translation-zh summarization

Of each case a few hundred rows are learned, once over unless the case says otherwise, and texts that the
model then writes for others are scored beside those of a copy: the source as it is, or, of a summary, its
first sentence. Differences have the 95 % interval of a paired bootstrap over rows.

Cases: `translation-de` (SmolLM2 with LoRA, English to German, news and parliament), `translation-zh` (the
same, English to Chinese, short sentences), `summarization` (the same, abstracts of papers to one sentence),
`t5` (an encoder-decoder that has learned nothing before, with a tokenizer of its own: English to Chinese).
Prints a table, and writes bench/results/tune/generation-CASE.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from report import describe_conditions

RESULTS = Path(__file__).resolve().parent / "results" / "tune"
Rows = list[dict[str, Any]]
SMOLLM = "smollm2-135m-instruct"


@dataclass(frozen=True, slots=True)
class Case:
    """What is learned, and how.

    Attributes:
        read: all rows of the set, from the folder of all sets.
        model: a name; None is a T5 that is made here.
        metric: what the difference is taken of.
    """

    task: str
    metric: str
    read: Callable[[Path], Rows]
    num_train: int
    num_dev: int
    model: str | None = SMOLLM
    method: str = "lora"
    epochs: int = 1
    batch_size: int = 8
    learning_rate: float = 1e-3
    max_length: int = 512
    max_tokens: int = 64


def read_german(data: Path) -> Rows:
    english, german = (
        (data / "mt_opennmt_en_de" / f"train.{language}").read_text("utf-8").split("\n")
        for language in ("en", "de")
    )
    pairs = zip(english, german, strict=True)
    return [{"source": a, "target": b} for a, b in pairs if a.strip() and b.strip()]


def read_chinese(data: Path) -> Rows:
    """The shorter half of the sentences, each English one once."""
    lines = (data / "mt_tatoeba_en_zh" / "cmn.txt").read_text("utf-8-sig").splitlines()
    pairs = dict(line.split("\t")[:2] for line in lines[: len(lines) // 2])
    return [{"source": english, "target": chinese} for english, chinese in pairs.items()]


def read_papers(data: Path) -> Rows:
    """Those of at most 1,400 characters; `lead` is the first sentence of an abstract."""
    lines = (data / "sum_scitldr_A" / "train.jsonl").read_text("utf-8").splitlines()
    rows = [
        {"source": " ".join(paper["source"]), "target": paper["target"][0], "lead": paper["source"][0]}
        for paper in map(json.loads, lines)
    ]
    return [row for row in rows if len(row["source"]) <= 1400]


CASES = {
    "translation-de": Case("translation", "chrf", read_german, 200, 50, max_tokens=96),
    "translation-zh": Case("translation", "chrf", read_chinese, 320, 80, max_tokens=48),
    "summarization": Case("summarization", "rougeL", read_papers, 160, 150),
    "t5": Case(
        "translation",
        "chrf",
        read_chinese,
        4000,
        80,
        model=None,
        method="full",
        epochs=4,
        batch_size=32,
        learning_rate=2e-3,
        max_length=64,
        max_tokens=32,
    ),
}


def make_t5(folder: Path, texts: Sequence[str]) -> None:
    """A T5 of two layers each, 128 wide, at random, and a tokenizer that is trained on `texts`."""
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    from fastserve.data import save_tokenizer, train_tokenizer

    save_tokenizer(train_tokenizer(texts, "bpe", vocab_size=4000), "bpe", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=512,
        num_layers=2,
        num_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    T5ForConditionalGeneration(config).save_pretrained(folder)


def measure(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """Tune, write, and compare. Returns the document of the case."""
    from fastserve.evaluate.bootstrap import bootstrap
    from fastserve.evaluate.prediction import PredictorOptions
    from fastserve.evaluate.task_evaluation import evaluate_folder
    from fastserve.evaluate.text_overlap import overlap_metrics
    from fastserve.tune import TuneOptions, tune

    rows = case.read(arguments.data)
    random.Random(0).shuffle(rows)
    num_train, num_dev = arguments.rows or case.num_train, arguments.dev_rows or case.num_dev
    dev, train = rows[:num_dev], rows[num_dev : num_dev + num_train]
    copies = {"source": [row["source"] for row in dev]}
    if "lead" in dev[0]:
        copies["first sentence"] = [row["lead"] for row in dev]
    targets = [row["target"] for row in dev]
    options = TuneOptions(
        method=case.method,  # type: ignore[arg-type] # one of its names
        rank=16,
        alpha=32.0,
        epochs=case.epochs,
        batch_size=case.batch_size,
        learning_rate=case.learning_rate,
        max_length=case.max_length,
        precision=arguments.precision,
        seed=arguments.seed,
        device="cpu",
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in train), encoding="utf-8")
        if case.model is None:
            make_t5(folder / "t5", [text for row in train for text in (row["source"], row["target"])])
        started = time.process_time()
        model = case.model or str(folder / "t5")
        result = tune(case.task, model=model, train=path, output=folder / "model", options=options)
        seconds = time.process_time() - started
        evaluation = evaluate_folder(result.path, dev, PredictorOptions(max_tokens=case.max_tokens))
    said = [str(prediction["text"]) for prediction in evaluation.predictions]
    scores = {name: overlap_metrics(texts, targets) for name, texts in copies.items()}
    scores["tuned"] = {name: evaluation.scores.metrics[name] for name in scores["source"]}
    best = max(copies, key=lambda name: scores[name][case.metric])

    def difference(chosen: NDArray[np.int64]) -> dict[str, float]:
        picked = [targets[index] for index in chosen]
        ours, theirs = (
            overlap_metrics([texts[index] for index in chosen], picked)[case.metric]
            for texts in (said, copies[best])
        )
        return {case.metric: ours - theirs}

    interval = bootstrap(difference, len(dev), resamples=arguments.resamples, seed=0)[case.metric]
    return {
        **describe_conditions(arguments),
        "task": case.task,
        "model": case.model or "t5, 2 + 2 layers, 128 wide, at random",
        "metric": case.metric,
        "options": asdict(options),
        "num_train": len(train),
        "num_dev": len(dev),
        "cpu_seconds": round(seconds, 1),
        "backend": evaluation.backend,
        "scores": scores,
        "best_copy": best,
        "difference": interval.to_json(),
        "examples": [{**row, "written": text} for row, text in zip(dev[:5], said, strict=False)],
        "mean_characters": statistics.mean(map(len, said)),
    }


def show(name: str, document: Mapping[str, Any]) -> None:
    metrics = ("bleu", "chrf", "rouge1", "rougeL")
    print(f"\n{name}: {document['num_train']} rows learned, {document['num_dev']} written")
    print(" | ".join(["what is scored", *metrics]))
    for what, scores in document["scores"].items():
        print(" | ".join([what, *(f"{scores[metric]:.3f}" for metric in metrics)]))
    gain = document["difference"]
    print(
        f"{document['metric']} over the {document['best_copy']}: {gain['value']:+.3f}, 95 % interval "
        f"{gain['low']:+.3f} to {gain['high']:+.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rows", type=int, help="to learn, in place of the case's own number")
    parser.add_argument("--dev-rows", type=int, help="to write, in place of the case's own number")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resamples", type=int, default=200, help="of the bootstrap")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the figures")
    arguments = parser.parse_args()

    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    arguments.results.mkdir(parents=True, exist_ok=True)
    for name in arguments.cases:
        document = measure(CASES[name], arguments)
        show(name, document)
        path = arguments.results / f"generation-{name}.json"
        path.write_text(json.dumps(document, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
