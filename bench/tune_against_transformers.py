"""`fastserve tune` beside a plain script on `transformers`, with the same settings, rows and seeds.

    python bench/tune_against_transformers.py --data shared/data --sets sms wnut17 --seeds 0 1 2

The script is a loop as tutorials write it: batches padded to their longest row, AdamW, a linear schedule with
warm-up, the last weights. Both are scored by the same code on the same dev rows, the script's weights by
PyTorch, fastserve's by the native runtime in float32; fastserve keeps the last weights too (no choice by the
dev rows). Products are in bf16 on both sides while they learn, unless --precision says otherwise.

The script takes fastserve's order of rows, and spares norms and biases from weight decay as it does: what is
left is arithmetic alone, so that a difference is a bug and not luck. With `--order own` it shuffles rows for
itself, of all lengths in a batch, and lets all weights decay: another draw of the same lottery.

Each pair of runs is added to bench/results/tune/SET.json at once; those that are there already, under the
same settings, are not run again. Sets and their sizes are in `tune_sets.py`; `tune_table.py` makes the table.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from report import describe_conditions
from tune_sets import SETS, Rows, TaskSet

RESULTS = Path(__file__).resolve().parent / "results" / "tune"
WARMUP, WEIGHT_DECAY = 0.06, 0.01


@dataclass(frozen=True, slots=True)
class Settings:
    """What both sides of a pair are told."""

    model: str
    num_train: int
    num_dev: int
    epochs: int
    batch_size: int
    learning_rate: float
    max_length: int
    precision: str
    order: str


@dataclass(frozen=True, slots=True)
class Trial:
    """One set with one seed."""

    task: str
    settings: Settings
    train: Rows
    dev: Rows
    seed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What trained weights are worth on the dev rows, and what they say of each."""

    metrics: dict[str, float]
    predictions: Sequence[Mapping[str, Any]]

    def share_alike(self, other: Outcome) -> float:
        """Of how many rows both say the same."""
        pairs = zip(self.predictions, other.predictions, strict=True)
        alike = [
            all(one[name] == two[name] for name in ("label", "tags", "answer") if name in one)
            for one, two in pairs
        ]
        return statistics.mean(alike)


def run_script(trial: Trial) -> Outcome:
    """The plain loop, and what its weights say of the dev rows."""
    import torch
    import transformers

    from fastserve.evaluate.task.table import TaskOptions, make_task
    from fastserve.evaluate.torch_model import run_examples
    from fastserve.hub.resolve import resolve

    settings, path = trial.settings, resolve(trial.settings.model)
    transformers.set_seed(trial.seed)
    task = make_task(trial.task, trial.train, TaskOptions(max_length=settings.max_length))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    kind = getattr(transformers, f"AutoModel{task.model_class}")
    model = kind.from_pretrained(path, **task.config())
    if trial.task == "relation-extraction":
        tokenizer.add_tokens(["[E1]", "[/E1]", "[E2]", "[/E2]"], special_tokens=True)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    examples = task.encode(trial.train, tokenizer, with_labels=True)
    batches, num_batches = make_batches(examples.features, tokenizer.pad_token_id, trial)
    num_steps = num_batches * settings.epochs
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.order),
        lr=settings.learning_rate,
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )
    schedule = transformers.get_linear_schedule_with_warmup(
        optimizer, math.ceil(WARMUP * num_steps), num_steps
    )
    transformers.set_seed(trial.seed)
    model.train()
    for epoch in range(settings.epochs):
        for inputs in batches(epoch):
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
                loss = model(**inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    encoded = task.encode(trial.dev, tokenizer, with_labels=False)
    logits, _ = run_examples(model, encoded.features, pad_token_id=tokenizer.pad_token_id, batch_size=32)
    predictions = task.decode(trial.dev, encoded, logits)
    return Outcome(task.score(trial.dev, predictions).metrics, predictions)


def parameter_groups(model: Any, order: str) -> list[dict[str, Any]]:
    """All weights alike, or, beside fastserve's own order, no decay for norms and biases."""
    if order == "own":
        return [{"params": list(model.parameters())}]
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def make_batches(
    features: Rows, pad_token_id: int, trial: Trial
) -> tuple[Callable[[int], Iterator[dict[str, Any]]], int]:
    """A function of the epoch that gives its batches, and their number."""
    import torch
    from torch.utils.data import DataLoader

    from fastserve.evaluate.task.collate import collate, example_length
    from fastserve.tune.sampler import EpochSampler

    def tensors(chosen: Rows) -> dict[str, Any]:
        arrays = collate(chosen, pad_token_id=pad_token_id)
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if trial.task == "question-answering":
            batch["start_positions"], batch["end_positions"] = batch.pop("labels").unbind(dim=1)
        return batch

    size = trial.settings.batch_size
    if trial.settings.order == "own":
        own: Any = DataLoader(features, batch_size=size, shuffle=True, collate_fn=tensors)  # type: ignore[arg-type]
        return (lambda epoch: iter(own)), len(own)
    sampler = EpochSampler([example_length(one) for one in features], batch_size=size, seed=trial.seed)
    loader: Any = DataLoader(features, batch_size=size, sampler=sampler, collate_fn=tensors)  # type: ignore[arg-type]

    def batches(epoch: int) -> Iterator[dict[str, Any]]:
        sampler.epoch = epoch
        return iter(loader)

    return batches, len(loader)


def run_fastserve(trial: Trial) -> Outcome:
    """`fastserve tune`, and then `fastserve evaluate` of the dev rows."""
    from fastserve.evaluate.prediction import PredictorOptions
    from fastserve.evaluate.task_evaluation import evaluate_folder
    from fastserve.tune import TuneOptions, tune

    settings = trial.settings
    options = TuneOptions(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        max_length=settings.max_length,
        precision=settings.precision,  # type: ignore[arg-type] # one of the choices
        warmup=WARMUP,
        weight_decay=WEIGHT_DECAY,
        seed=trial.seed,
        device="cpu",
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in trial.train), encoding="utf-8")
        result = tune(
            trial.task, model=settings.model, train=path, output=Path(folder) / "model", options=options
        )
        predictor = PredictorOptions(weights="f32", truncate=True)
        evaluation = evaluate_folder(result.path, trial.dev, predictor)
        return Outcome(evaluation.scores.metrics, evaluation.predictions)


SIDES = {"script": run_script, "fastserve": run_fastserve}


def settings_of(chosen: TaskSet, train: Rows, dev: Rows, arguments: argparse.Namespace) -> Settings:
    return Settings(
        model=arguments.model,
        num_train=len(train),
        num_dev=len(dev),
        epochs=arguments.epochs or chosen.epochs,
        batch_size=chosen.batch_size,
        learning_rate=arguments.learning_rate or chosen.learning_rate,
        max_length=chosen.max_length,
        precision=arguments.precision,
        order=arguments.order,
    )


def measure(name: str, arguments: argparse.Namespace) -> None:
    """Run the pairs of a set that its file lacks, and add them to it."""
    chosen = SETS[name]
    train, dev = chosen.split(arguments.data)
    train, dev = train[: arguments.limit], dev[: arguments.limit]
    settings = settings_of(chosen, train, dev, arguments)
    suffix = "" if settings.order == "same" else "-own-order"
    path = arguments.results / f"{name}{suffix}.json"
    document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    runs: list[dict[str, Any]] = document["runs"] if document.get("settings") == asdict(settings) else []
    done = {run["seed"] for run in runs}
    for seed in arguments.seeds:
        if seed in done:
            continue
        trial = Trial(chosen.task, settings, train, dev, seed)
        outcomes = {}
        for side, run in SIDES.items():
            started = time.process_time()
            outcomes[side] = run(trial)
            seconds = round(time.process_time() - started, 1)
            metrics = outcomes[side].metrics
            runs.append({"seed": seed, "side": side, "metrics": metrics, "cpu_seconds": seconds})
            value = metrics[chosen.metric]
            print(f"{name} seed {seed} {side}: {chosen.metric} {value:.4f}, {seconds} s of CPU", flush=True)
        runs[-1]["share_alike"] = outcomes["fastserve"].share_alike(outcomes["script"])
        conditions = describe_conditions(arguments)
        about = {"set": name, "task": chosen.task, "metric": chosen.metric, "settings": asdict(settings)}
        arguments.results.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**conditions, **about, "runs": runs}, indent=2) + "\n", encoding="utf-8")
    means = {
        side: statistics.mean(run["metrics"][chosen.metric] for run in runs if run["side"] == side)
        for side in SIDES
    }
    print(
        f"{name}: {chosen.metric} of {len(dev)} dev rows, mean of {len(runs) // 2} seeds: "
        f"script {means['script']:.4f}, fastserve {means['fastserve']:.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--model", default="all-minilm-l6-v2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--order", choices=["same", "own"], default="same")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--epochs", type=int, help="in place of the set's own")
    parser.add_argument("--learning-rate", type=float, help="in place of the set's own")
    parser.add_argument("--limit", type=int, help="so many rows to train on and to judge")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the figures")
    arguments = parser.parse_args()

    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in arguments.sets:
        measure(name, arguments)


if __name__ == "__main__":
    main()
