"""What is checked before anything of a tuning run is trained, and what it goes into the run as."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from fastserve._version import __version__
from fastserve.data.problem import Problem
from fastserve.errors import OptionError, UnsupportedError
from fastserve.evaluate.plot import check_plot
from fastserve.evaluate.task.table import TaskOptions, check_metric
from fastserve.evaluate.task.task import Task
from fastserve.hub.resolve import resolve
from fastserve.tune.dependency import check_tune_libraries
from fastserve.tune.digest import digest_files
from fastserve.tune.options import INDIFFERENT, MIN_MAX_LENGTH, TuneOptions
from fastserve.tune.prefix import check_prefix
from fastserve.tune.rows import RunRows, read_run_rows
from fastserve.tune.run_folder import RunFolder
from fastserve.tune.source_model import SourceModel, open_source_model, outline_model
from fastserve.tune.weight_change import WeightChange
from fastserve.types import JsonObject

_VERSIONS_OF = ("torch", "transformers", "tokenizers", "accelerate", "peft", "numpy")


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A run that has been checked, and not begun."""

    folder: RunFolder
    source: SourceModel
    options: TuneOptions
    metric: str | None
    rows: RunRows
    lineage: JsonObject
    change: WeightChange | None

    @property
    def task(self) -> Task:
        return self.rows.task

    @property
    def request(self) -> JsonObject:
        """What a run that is resumed must have been asked for too: all that its result depends on."""
        names = ("model", "data", "on_problem", "change")
        known = {name: self.lineage[name] for name in names if name in self.lineage}
        options = {name: value for name, value in self.lineage["options"].items() if name not in INDIFFERENT}
        return known | {"options": options, "task": self.task.name}


def prepare(
    task: str,
    model: str,
    train: str | Path,
    dev: str | Path | None,
    output: Path,
    options: TuneOptions,
    on_problem: Mapping[str, str],
    *,
    change: WeightChange | None = None,
    report_problem: Callable[[Problem], None] | None = None,
) -> PreparedRun:
    """Check all that can be checked before anything is trained. Arguments and errors as of
    `fastserve.tune.tune`."""
    check_tune_libraries()
    _check_precision(options)
    if change is not None:
        _check_change(options)
    if dev is None and (options.metric or options.patience):
        name = "metric" if options.metric else "patience"
        raise OptionError(f"{name} needs dev rows", hint="give them with --dev", option=name)
    source = open_source_model(model, resolve(model))
    task_options = _task_options(source, options)
    rows = read_run_rows(task, train, dev, task_options, on_problem=on_problem, report_problem=report_problem)
    check_prefix(model, source.config, rows.task, options)
    metric = None
    if rows.dev is not None:
        metric = options.metric or rows.task.metrics[0]
        check_metric(rows.task, metric)
    if options.tensor_parallel > 1:
        from fastserve.tune.tensor_parallel import tensor_plan

        tensor_plan(outline_model(source, rows.task), options.tensor_parallel)
    check_plot(output.parent)
    lineage = {
        "parent": source.lineage(),
        "model": model,
        "data": {"train": digest_files([train]), **({} if dev is None else {"dev": digest_files([dev])})},
        "rows": {"train": len(rows.train), **({} if rows.dev is None else {"dev": len(rows.dev)})},
        "on_problem": dict(on_problem),
        "problems": rows.problem_counts,
        "options": asdict(options),
        **({} if change is None else {"change": change.to_json()}),
        "versions": _versions(),
    }
    return PreparedRun(RunFolder(output), source, options, metric, rows, lineage, change)


def default_metric(
    task: str,
    *,
    model: str,
    train: str | Path,
    options: TuneOptions,
    on_problem: Mapping[str, str],
) -> str:
    """The metric that chooses the best weights of a task where none is named. Raises as `tune`."""
    check_tune_libraries()
    task_options = _task_options(open_source_model(model, resolve(model)), options)
    return read_run_rows(task, train, None, task_options, on_problem=on_problem).task.metrics[0]


def _task_options(source: SourceModel, options: TuneOptions) -> TaskOptions:
    limit = source.config.get("max_position_embeddings") or source.config.get("n_positions")
    num_prefix_tokens = options.prefix_tokens if options.method == "prefix" else 0
    room = None if limit is None else limit - num_prefix_tokens
    if limit is not None and room is not None and num_prefix_tokens and room < MIN_MAX_LENGTH:
        raise OptionError(
            f"prefix_tokens={num_prefix_tokens} leaves texts {max(room, 0)} of the model's {limit} positions",
            hint=f"choose at most {limit - MIN_MAX_LENGTH}",
            option="prefix_tokens",
        )
    if options.max_length is not None and room is not None and options.max_length > room:
        beside = f", of which its prefix has {num_prefix_tokens}" if num_prefix_tokens else ""
        raise OptionError(
            f"max_length={options.max_length} is more than the model's {limit} positions{beside}",
            hint=f"choose at most {room}",
            option="max_length",
        )
    return TaskOptions(
        max_length=options.max_length or source.max_tokens_after(num_prefix_tokens),
        stride=options.stride,
        problem=None if options.problem == "auto" else options.problem,
        instruction=options.instruction,
        is_encoder_decoder=bool(source.config.get("is_encoder_decoder")),
        decoder_start=source.config.get("decoder_start_token_id"),
    )


def _check_precision(options: TuneOptions) -> None:
    import torch

    on_cpu = options.device == "cpu" or not torch.cuda.is_available()
    if options.precision == "fp16" and on_cpu:
        raise OptionError(
            "precision='fp16' needs a GPU", hint="choose bf16 or fp32 on a CPU", option="precision"
        )
    if options.optimizer == "adamw-8bit":
        from importlib.util import find_spec

        if find_spec("bitsandbytes") is None:
            raise UnsupportedError(
                "optimizer='adamw-8bit' needs bitsandbytes", hint="pip install bitsandbytes, or choose adamw"
            )


def _check_change(options: TuneOptions) -> None:
    if options.is_adapter or options.has_parts:
        name = "method" if options.is_adapter else "shard" if options.shard else "tensor_parallel"
        raise OptionError(
            f"{name}={getattr(options, name)!r} does not go with a change of weights: a module must have its"
            " whole weight",
            hint="choose full, last-layers or head, and processes that share each batch alone",
            option=name,
        )


def _versions() -> dict[str, str]:
    return {"fastserve": __version__, **{name: metadata.version(name) for name in _VERSIONS_OF}}
