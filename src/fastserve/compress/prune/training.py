"""Working models go to `fastserve.tune` and come back: written as folders in scratch, where a run that was
interrupted goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.checkpoint.safetensors_writer import floats
from fastserve.checkpoint.tensor import TensorFormat
from fastserve.checkpoint.to_safetensors import write_folder
from fastserve.compress.calibration import torch_threads
from fastserve.compress.prune.heads import missing_heads, with_all_heads, without_last_heads
from fastserve.compress.step import Context, WorkingModel
from fastserve.errors import DataError, OptionError
from fastserve.evaluate.task.table import TaskOptions, check_metric
from fastserve.models.config import EncoderConfig
from fastserve.models.family import read_config
from fastserve.option import check_kind
from fastserve.tune import TuneOptions, tune
from fastserve.tune.rows import read_run_rows
from fastserve.tune.teacher import check_teacher
from fastserve.tune.trainer import Progress
from fastserve.tune.weight_change import WeightChange

_MOST_TOKENS = 512  # of rows that are looked at, and not encoded


@dataclass(frozen=True, slots=True)
class Tuning:
    """How working models are tuned: zeros are kept.

    Attributes:
        on_problem: what to do about problems of the rows, as of `fastserve.tune.tune`.
        change: what the model computes with in place of its weights; None: with them.
    """

    options: TuneOptions
    on_problem: Mapping[str, str]
    change: WeightChange | None = None


def read_tuning(values: Mapping[str, Any], context: Context | None = None) -> Tuning:
    """What a step's option `tune` says: options of `fastserve tune` by name, and `on_problem`.

    Raises:
        OptionError: one that tuning does not have, or a value out of range.
    """
    known = {field.name for field in fields(TuneOptions)} - {"keep_zeros"}
    named = {str(name).replace("-", "_"): value for name, value in values.items()}
    on_problem = named.pop("on_problem", {})
    check_kind("on_problem", on_problem, Mapping, "a mapping of kinds of problems to actions")
    if unknown := sorted(named.keys() - known):
        raise OptionError(
            f"tune: {unknown[0]!r} is no option of tuning a pruned model",
            hint=f"options are on_problem, {', '.join(sorted(known))}",
            option="tune",
        )
    seed = {} if context is None else {"seed": context.seed}
    return Tuning(TuneOptions(**{**seed, **named, "keep_zeros": True}), dict(on_problem))


def tune_model(model: WorkingModel, context: Context, tuning: Tuning, *, step: str) -> WorkingModel:
    """The model after tuning on the context's rows. Its tensors are mapped from a folder in
    `context.scratch`, which has tokenizer, labels and settings too.

    A run that was interrupted goes on, and one that has ended is read, where model, options and scratch are
    the same.

    Raises:
        DataError: there are no rows.
        OptionError: matrices are quantized.
        As `fastserve.tune.tune`.
    """
    train = training_rows(context, step)
    _refuse_quantized(model, step)
    folder = context.scratch / f"{step}-{_digest(model, context, tuning)}"
    source, output = folder / "source", folder / "tuned"
    if not output.exists():
        write_trainable(model, source)

        def report(progress: Progress) -> None:
            context.progress(step, progress.step, progress.num_steps)

        with torch_threads(context.threads):
            result = tune(
                task_of(model, context, step),
                model=str(source),
                train=train,
                dev=context.dev,
                output=output,
                options=tuning.options,
                on_problem=tuning.on_problem,
                change=tuning.change,
                resume=True,
                report=report,
            )
        if result.metric is not None:
            context.notes.append(
                f"{step}: {result.metric} {result.metrics[result.metric]:.4f} on the dev rows after"
                f" {result.num_steps} steps"
            )
    tuned = replace(model, checkpoint=open_checkpoint(output))
    return without_last_heads(tuned, missing_heads(model))


def check_tuning(model: WorkingModel, context: Context, tuning: Tuning, *, step: str) -> None:
    """Refuse what `tune_model` would for the files, the task or the teacher. Raises as it does."""
    train = training_rows(context, step)
    options = tuning.options
    task_options = TaskOptions(
        max_length=options.max_length or _MOST_TOKENS,
        problem=None if options.problem == "auto" else options.problem,
    )
    name = task_of(model, context, step)
    rows = read_run_rows(name, train, context.dev, task_options, on_problem=tuning.on_problem)
    if rows.dev is not None and options.metric is not None:
        check_metric(rows.task, options.metric)
    if options.teacher is not None:
        check_teacher(options.teacher, rows.task)


def training_rows(context: Context, step: str) -> Path:
    """
    Raises:
        DataError: the context has none.
    """
    if context.train is None:
        raise DataError(f"{step} needs rows to tune on", hint="name a file with --train")
    return context.train


def task_of(model: WorkingModel, context: Context, step: str) -> str:
    """The task that a model is tuned for: the context's, or that of its own `fastserve.json`; a decoder's is
    its text.

    Raises:
        OptionError: it is an encoder, and nothing says which.
    """
    task = context.task or model.checkpoint.card.get("task")
    if task is None and isinstance(read_config(model.config), EncoderConfig):
        raise OptionError(
            f"{step}: {model.checkpoint.path} is an encoder of no task",
            hint="name one with --task",
            option="task",
        )
    return str(task or "causal-lm")


def write_trainable(model: WorkingModel, folder: Path) -> None:
    """A folder that `transformers` opens, in float32, heads that were taken out being zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = with_all_heads(model).checkpoint
    tensors = [floats(tensor, TensorFormat.F32) for tensor in checkpoint.tensors.values()]
    write_folder(checkpoint, folder, tensors, TensorFormat.F32, None)


def _refuse_quantized(model: WorkingModel, step: str) -> None:
    for tensor in model.tensors.values():
        if isinstance(tensor, GroupedTensor):
            raise OptionError(
                f"{step} comes before quantization: {tensor.name} is int{tensor.bits}",
                hint="put it before the steps that quantize",
            )


def _digest(model: WorkingModel, context: Context, tuning: Tuning) -> str:
    """Of all that decides what tuning gives."""
    told = replace(tuning, options=replace(tuning.options, teacher_processes=1))  # gives the same
    digest = hashlib.sha256(repr((told, context.task)).encode())
    for path in (context.train, context.dev):
        digest.update(b"" if path is None else path.read_bytes())
    digest.update(repr(sorted(model.config.items(), key=str)).encode())
    for name, tensor in model.tensors.items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.data).data)
    return digest.hexdigest()[:24]
