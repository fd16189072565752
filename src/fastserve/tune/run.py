"""A tuning run from its rows to a model directory."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve.evaluate.task.embedding import Embedding
from fastserve.evaluate.task.task import Scores, Task
from fastserve.evaluate.training_plot import plot_training
from fastserve.tune.options import TuneOptions
from fastserve.tune.prepared_run import PreparedRun, prepare
from fastserve.tune.run_folder import RunFolder
from fastserve.tune.source_model import SourceModel, load_model
from fastserve.tune.weight_change import WeightChange
from fastserve.types import JsonObject

if TYPE_CHECKING:
    from fastserve.tune.trainer import BestWeights, DevRows, Progress, TaskTrainer

_PLOT_SECONDS = 10.0  # between two drawings of the curves of a run that goes on
_OPTIMIZERS = {
    "adamw": "adamw_torch_fused",  # a tenth of the time of the loop over weights, on a CPU too
    "sgd": "sgd",
    "adafactor": "adafactor",
    "adamw-8bit": "adamw_bnb_8bit",
}


@dataclass(frozen=True, slots=True)
class TuneResult:
    """What a run has made.

    Attributes:
        path: the model directory.
        metrics: of the dev rows, under the weights that were kept; empty without dev rows.
        metric: the one that chose them.
        best_step: the step of the optimizer that they are of; None where they are the last.
        num_steps: of the optimizer, in all.
        seconds: of this process, from opening the rows to writing the model.
        num_cut: training rows of which something was cut off at `max_length`.
        resumed_at: the step that the run went on from, where it did.
        problems: of the rows, by kind and what was done about them, how many.
    """

    path: Path
    metrics: dict[str, float]
    metric: str | None
    best_step: int | None
    num_steps: int
    seconds: float
    num_cut: int
    resumed_at: int | None
    problems: dict[str, int]

    def to_json(self) -> JsonObject:
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True, slots=True)
class WorkerRequest:
    """What a process that trains with others needs to know: the arguments of `tune`."""

    task: str
    model: str
    train: str
    dev: str | None
    output: str
    options: TuneOptions
    on_problem: Mapping[str, str] | None
    change: WeightChange | None


def tune_as_worker(
    request: WorkerRequest,
    *,
    report: Callable[[Progress], None] | None,
    on_evaluate: Callable[[int, dict[str, float]], None] | None,
) -> TuneResult:
    """One process's part of a run that `tune` has begun. The first one reports, and writes the model."""
    started = time.monotonic()
    prepared = prepare(
        request.task,
        request.model,
        request.train,
        request.dev,
        Path(request.output),
        request.options,
        request.on_problem or {},
        change=request.change,
    )
    return Run(prepared, report, on_evaluate).run(prepared.folder.last_checkpoint(), started)


@dataclass(frozen=True, slots=True)
class Run:
    """What a prepared run does in this process. The first process reports, and writes the model."""

    prepared: PreparedRun
    report: Callable[[Progress], None] | None
    on_evaluate: Callable[[int, dict[str, float]], None] | None

    @property
    def folder(self) -> RunFolder:
        return self.prepared.folder

    @property
    def source(self) -> SourceModel:
        return self.prepared.source

    @property
    def task(self) -> Task:
        return self.prepared.task

    @property
    def options(self) -> TuneOptions:
        return self.prepared.options

    @property
    def metric(self) -> str | None:
        return self.prepared.metric

    def run(self, checkpoint: Path | None, started: float) -> TuneResult:
        """Train, from a checkpoint on where there is one, and write the model directory. `started` is by
        `time.monotonic`."""
        rows, dev_rows = self.prepared.rows.train, self.prepared.rows.dev
        import transformers

        from fastserve.tune.adapter import merge_adapter, prepare_weights, save_adapter
        from fastserve.tune.loss import loss_of
        from fastserve.tune.prefix import take_off_prefix
        from fastserve.tune.trainer import BestWeights, DevRows, Reporter, TaskTrainer
        from fastserve.tune.zeros import KeepZeros

        transformers.set_seed(self.options.seed)
        model = load_model(self.source, self.task, dropout=self.options.dropout)
        tokenizer = self.source.tokenizer
        examples = self.task.encode(rows, tokenizer, with_labels=True)
        dev: DevRows | None = None
        if dev_rows is not None:
            dev = DevRows(dev_rows, self.task.encode(dev_rows, tokenizer, with_labels=True))
        model = prepare_weights(model, self.task, self.options)
        callbacks: list[Any] = [Reporter(self.report, self._draw_sometimes(), self.on_evaluate)]
        best: BestWeights | None = None
        if self.metric is not None:
            best = BestWeights(self.folder.best, self.metric, patience=self.options.patience)
            callbacks.append(best)
        if self.options.keep_zeros:
            callbacks.append(KeepZeros(model))
        if self.prepared.change is not None:  # its parameters may be 0, and are not pruned
            self.prepared.change.apply(model)
        arguments = self._training_arguments(has_dev=dev is not None)
        make_trainer: Callable[..., TaskTrainer] = TaskTrainer
        if self.options.has_parts:
            from fastserve.tune.sharding import ShardedTrainer, cut_model

            cut = cut_model(
                model,
                arguments.device,  # asking for it has processes find each other
                tensor_parallel=self.options.tensor_parallel,
                shard=self.options.shard,
            )
            make_trainer = partial(ShardedTrainer, cut=cut)
        elif self.options.teacher is not None:
            from fastserve.tune.teaching import taught_trainer

            make_trainer = taught_trainer(
                self.options, self.task, self.source, examples, self.folder, is_first=_is_first_process()
            )
        trainer = make_trainer(
            model=model,
            args=arguments,
            task=self.task,
            examples=examples,
            dev=dev,
            loss=loss_of(self.task, self.options, examples.features),
            pad_token_id=tokenizer.pad_token_id,
            callbacks=callbacks,
        )
        log = self._train(trainer, best, checkpoint)
        trained = trainer.accelerator.unwrap_model(trainer.model)
        trainer.accelerator.wait_for_everyone()  # until the best weights are written
        best_step = None if best is None else best.load_into(trained)
        scores = trainer.score_dev() if dev is not None else None
        num_steps = max((entry.get("step", 0) for entry in log), default=0)
        result = TuneResult(
            path=self.folder.output,
            metrics={} if scores is None else scores.metrics,
            metric=self.metric,
            best_step=best_step,
            num_steps=num_steps,
            seconds=time.monotonic() - started,
            num_cut=examples.num_cut,
            resumed_at=None if checkpoint is None else int(checkpoint.name.rpartition("-")[2]),
            problems=self.prepared.rows.problem_counts,
        )
        if self.options.has_parts:
            trained = self._put_together(trained)
        if _is_first_process():
            plot_training(log, self.folder.plots, title=self._title)
            self._write_lines("log.jsonl", log)
            if problems := self.prepared.rows.problems:
                self._write_lines("problems.jsonl", [problem.to_dict() for problem in problems])
            adapter: Path | None = None
            prefix: dict[str, Any] = {}
            if self.options.is_adapter:
                save_adapter(trained, self.folder.path / "adapter")
                adapter = self.folder.path / "adapter"
            if self.options.method == "prefix":
                trained, prefix = take_off_prefix(trained)
            elif adapter is not None:
                trained = merge_adapter(trained)
            self._write(trained, result, scores, adapter, prefix)
            self.folder.finish(keep=self.options.keep_checkpoints)
        return result

    def _put_together(self, trained: Any) -> Any:
        """A model in parts whole again, in the first process; the others take part."""
        from fastserve.tune.adapter import prepare_weights
        from fastserve.tune.part import gather_weights

        weights = gather_weights(trained, keeps=_is_first_process())
        if not _is_first_process():
            return trained
        model = load_model(self.source, self.task, dropout=self.options.dropout)
        model = prepare_weights(model, self.task, self.options)
        model.load_state_dict(weights)
        if hasattr(trained, "config"):
            model.config.use_cache = trained.config.use_cache  # which the trainer sets
        return model

    @property
    def _title(self) -> str:
        return f"{self.task.name} from {self.source.spec}"

    def _train(
        self, trainer: TaskTrainer, best: BestWeights | None, checkpoint: Path | None
    ) -> list[JsonObject]:
        """Run what is left of the training. Returns the log of all of it."""
        if checkpoint is not None and best is not None:
            state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            if best.has_stopped(state["log_history"]):  # and then was killed while it wrote the model
                return list(state["log_history"])
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if best is not None and best.standing(trainer.state.log_history)[0] is None:
            trainer.evaluate()
        return list(trainer.state.log_history)

    def _training_arguments(self, *, has_dev: bool) -> Any:
        import torch
        from transformers import TrainingArguments

        options = self.options
        schedule = options.schedule.replace("-", "_")
        if schedule == "constant" and options.warmup:
            schedule = "constant_with_warmup"
        interval = "epoch" if options.eval_steps is None else "steps"
        save_steps = options.save_steps or options.eval_steps
        return TrainingArguments(
            output_dir=str(self.folder.checkpoints),
            num_train_epochs=options.epochs,
            max_steps=options.max_steps or -1,
            per_device_train_batch_size=options.batch_size // options.num_shares,
            gradient_accumulation_steps=options.accumulation,
            learning_rate=options.peak_learning_rate,
            optim=_OPTIMIZERS[options.optimizer],
            lr_scheduler_type=schedule,
            warmup_steps=options.warmup,
            weight_decay=options.weight_decay,
            max_grad_norm=options.max_grad_norm,
            bf16=options.precision == "bf16",
            fp16=options.precision == "fp16",
            activation_checkpointing=options.gradient_checkpointing or None,
            eval_strategy=interval if has_dev else "no",
            eval_steps=options.eval_steps,
            save_strategy="epoch" if save_steps is None else "steps",
            save_steps=save_steps or 500,
            save_total_limit=2,
            logging_strategy="steps",
            logging_steps=10,
            seed=options.seed,
            use_cpu=options.device == "cpu" or not torch.cuda.is_available(),
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            ddp_find_unused_parameters=isinstance(self.task, Embedding),  # the encoder's own pooler
        )

    def _draw_sometimes(self) -> Callable[[list[dict[str, Any]]], None]:
        last = time.monotonic()

        def draw(log: list[dict[str, Any]]) -> None:
            nonlocal last
            if time.monotonic() - last > _PLOT_SECONDS:
                plot_training(log, self.folder.plots, title=self._title, is_live=True)
                last = time.monotonic()

        return draw

    def _write_lines(self, name: str, entries: Seq[JsonObject]) -> None:
        lines = (f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in entries)
        (self.folder.plots / name).write_text("".join(lines), encoding="utf-8")

    def _write(
        self,
        model: Any,
        result: TuneResult,
        scores: Scores | None,
        adapter: Path | None,
        prefix: Mapping[str, Any],
    ) -> None:
        from fastserve.tune.artifact import write_artifact
        from fastserve.tune.card import write_card

        rows, problems = self.prepared.rows.train, self.prepared.rows.problem_counts
        facts = {
            "training rows": str(len(rows)),
            "steps": str(result.num_steps),
            "kept weights": "the last" if result.best_step is None else f"of step {result.best_step}",
            "chosen by": self.metric or "nothing: there were no dev rows",
            "rows cut at the longest example": str(result.num_cut),
            "seconds": f"{result.seconds:.0f}",
            "problems of the data": ", ".join(f"{n} {kind}" for kind, n in problems.items()) or "none",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        }
        card = write_card(
            task=self.task,
            options=self.options,
            lineage=self.prepared.lineage,
            train=rows,
            scores=scores,
            facts=facts,
        )
        write_artifact(
            self.folder.output,
            model=model,
            tokenizer=self.source.tokenizer,
            task=self.task,
            lineage=self.prepared.lineage,
            metrics=result.metrics,
            card=card,
            plots=self.folder.plots,
            max_tokens=self.source.limit,
            adapter=adapter,
            prefix=prefix,
        )


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
