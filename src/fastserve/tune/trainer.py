"""`transformers.Trainer` on our tasks: our order of rows, losses and scores, and the best weights kept
aside."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    trainer_callback,
)

from fastserve.evaluate.task.collate import collate, example_length
from fastserve.evaluate.task.task import IGNORED, LOWER_IS_BETTER, Examples, Features, Row, Scores, Task
from fastserve.evaluate.torch_model import reduction_of, run_examples
from fastserve.tune.loss import Loss
from fastserve.tune.part import is_part, set_weights, whole
from fastserve.tune.sampler import EpochSampler, SharedBatches
from fastserve.types import JsonObject


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is: steps of the optimizer done and to do, and the figures that were logged last."""

    step: int
    num_steps: int
    figures: dict[str, float]


Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class DevRows:
    """Rows that a run is judged by, encoded."""

    rows: Seq[Row]
    examples: Examples


class TaskTrainer(Trainer):  # type: ignore[misc]
    """A trainer of one task.

    `evaluate` gives the task's metrics and `loss`, as `eval_NAME`; every process computes all of them, so
    that all agree on which weights are best. `share`, where it is not that of all processes, is which of how
    many shares of each batch this process has: (0, 2) is the first half.
    """

    def __init__(
        self,
        *,
        model: Any,
        args: TrainingArguments,
        task: Task,
        examples: Examples,
        dev: DevRows | None,
        loss: Loss,
        pad_token_id: int,
        callbacks: list[TrainerCallback],
        share: tuple[int, int] | None = None,
    ) -> None:
        lengths = [example_length(features) for features in examples.features]
        self._share: tuple[int, int] = share or (args.process_index, args.world_size)
        batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * self._share[1]
        self._sampler = EpochSampler(lengths, batch_size=batch_size, seed=args.seed)
        self._task, self._dev, self._loss = task, dev, loss
        self._pad_token_id = pad_token_id
        self._reduce = reduction_of(task)
        super().__init__(
            model=model,
            args=args,
            train_dataset=[*examples.features, _blank(examples.features[0])],
            eval_dataset=[] if dev is None else dev.examples.features,
            data_collator=self._collate,
            compute_loss_func=loss,
            callbacks=[_EpochSetter(self._sampler), *callbacks],
        )
        self.remove_callback(trainer_callback.ProgressCallback)
        self.remove_callback(trainer_callback.PrinterCallback)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The parts of batches that this process computes."""
        batches = SharedBatches(
            self._sampler,
            part_size=self._train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            share=self._share[0],
            num_shares=self._share[1],
            blank=len(self._sampler),
        )
        loader = DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)
        # Told of one process: accelerate fills a short last batch with rows that were seen already.
        prepared: DataLoader[Any] = prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True
        )
        return prepared

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **more: Any) -> Any:
        """As `transformers.Trainer` calls it; of a part without rows, 0, with gradients that are 0."""
        labels = inputs["labels"]
        found = super().compute_loss(model, inputs, *arguments, **more)
        if not isinstance(found, tuple):
            return without_blank(found, labels)
        return without_blank(found[0], labels), found[1]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The metrics of the dev rows under the present weights."""
        scores = self.score_dev()
        metrics = {f"eval_{name}": value for name, value in scores.metrics.items()}
        self.log(metrics)
        handler: Any = self.callback_handler
        self.control: TrainerControl = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def score_dev(self) -> Scores:
        """The scores of the dev rows under the present weights."""
        assert self._dev is not None
        logits, loss = run_examples(
            self.accelerator.unwrap_model(self.model),
            self._dev.examples.features,
            pad_token_id=self._pad_token_id,
            batch_size=max(16, self.args.per_device_train_batch_size),
            loss=None if self._reduce is not None else self._loss,
            reduce=self._reduce,
        )
        predictions = self._task.decode(self._dev.rows, self._dev.examples, logits)
        scores = self._task.score(self._dev.rows, predictions)
        if loss is not None:
            scores.metrics["loss"] = loss
        return scores

    def _collate(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        arrays = collate(features, pad_token_id=self._pad_token_id)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _blank(features: Features) -> Features:
    """What a process computes that has no rows of a batch: an example of which nothing is learned."""
    labels = features["labels"]
    nothing: Any = [type(label)(IGNORED) for label in labels] if isinstance(labels, list) else IGNORED
    return {**features, "labels": float(nothing) if isinstance(labels, float) else nothing}


def without_blank(loss: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of a part of a batch, or 0 where it has no rows; losses of numbers and pairs ignore no
    label."""
    return loss * (labels != IGNORED).any()


class _EpochSetter(TrainerCallback):  # type: ignore[misc]
    """Tells the sampler its epoch, which loaders that skip batches do not pass on."""

    def __init__(self, sampler: EpochSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._sampler.epoch = math.floor((state.epoch or 0.0) + 1e-6)


class BestWeights(TrainerCallback):  # type: ignore[misc]
    """Keeps the trained weights of the best evaluation in a folder, and stops a run that gets no better.

    What it knows is read off the log of the run, which checkpoints hold: a run that is resumed decides as one
    that never stopped.
    """

    def __init__(self, folder: Path, metric: str, *, patience: int | None) -> None:
        self._folder = folder
        self._metric = metric
        self._patience = patience
        self._sign = -1.0 if metric in LOWER_IS_BETTER else 1.0

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        model: Any = None,
        **_: Any,
    ) -> None:
        best_step, num_worse = self.standing(state.log_history)
        if best_step == state.global_step:
            about = {"step": state.global_step, "metric": self._metric}
            self._save(model, about, writes=args.should_save)
        if self._patience is not None and num_worse >= self._patience:
            control.should_training_stop = True

    def standing(self, log_history: Seq[JsonObject]) -> tuple[int | None, int]:
        """The step of the best evaluation, the earliest of equal ones, and how many came after it."""
        best_step, best, num_worse = None, -math.inf, 0
        for entry in log_history:
            if f"eval_{self._metric}" in entry:
                value = self._sign * entry[f"eval_{self._metric}"]
                if value > best:
                    best_step, best, num_worse = entry["step"], value, 0
                else:
                    num_worse += 1
        return best_step, num_worse

    def has_stopped(self, log_history: Seq[JsonObject]) -> bool:
        """Whether a run with this log ended by patience."""
        return self._patience is not None and self.standing(log_history)[1] >= self._patience

    def load_into(self, model: Any) -> int | None:
        """Put the best weights into a model. Returns their step, or None where there was no evaluation."""
        if not (self._folder / "step.json").is_file():
            return None
        set_weights(model, load_file(self._folder / "weights.safetensors"))
        step: int = json.loads((self._folder / "step.json").read_text(encoding="utf-8"))["step"]
        return step

    def _save(self, model: Any, about: JsonObject, *, writes: bool) -> None:
        """All processes take part, as each has a part of weights that are sharded; one of them writes."""
        model = getattr(model, "module", model)
        weights = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (writes or is_part(parameter)):
                weights[name] = whole(parameter).cpu().contiguous()
        if not writes:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        written = self._folder / "weights.safetensors.part"
        save_file(weights, written)
        os.replace(written, self._folder / "weights.safetensors")
        written = self._folder / "step.json.part"
        written.write_text(json.dumps(about), encoding="utf-8")
        os.replace(written, self._folder / "step.json")


class Reporter(TrainerCallback):  # type: ignore[misc]
    """Tells how far a run is, after every step and evaluation, and hands over its log when something is
    added."""

    def __init__(
        self,
        report: Report | None,
        on_log: Callable[[list[dict[str, Any]]], None] | None,
        on_evaluate: Callable[[int, dict[str, float]], None] | None,
    ) -> None:
        self._report = report
        self._on_log = on_log
        self._on_evaluate = on_evaluate
        self._figures: dict[str, float] = {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._tell(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **_: Any,
    ) -> None:
        self._figures |= {name: value for name, value in logs.items() if isinstance(value, int | float)}
        self._tell(state)
        if self._on_log is not None and state.is_world_process_zero:
            self._on_log(state.log_history)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        if self._on_evaluate is not None:
            self._on_evaluate(
                state.global_step, {name.removeprefix("eval_"): value for name, value in metrics.items()}
            )

    def _tell(self, state: TrainerState) -> None:
        if self._report is not None and state.is_world_process_zero:
            self._report(Progress(state.global_step, state.max_steps, self._figures))
