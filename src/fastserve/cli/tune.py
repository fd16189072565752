"""`fastserve tune`: from a pretrained model and labelled rows to a model directory that serves a task."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from fastserve.cli.engine_option import pack_options
from fastserve.cli.option import (
    json_option,
    network_forbidden,
    offline_option,
    on_problem_option,
    printed_problems,
)
from fastserve.cli.report import print_json, print_table
from fastserve.errors import OptionError
from fastserve.tune.options import TuneOptions, read_option_file

if TYPE_CHECKING:
    from fastserve.tune.run import TuneResult
    from fastserve.tune.trainer import Progress

_TRIALS = 20  # of a search that does not say how many

_HELP: Mapping[str, str] = {
    "epochs": "How often all training rows are seen.",
    "max_steps": "End after so many steps, whatever --epochs says.",
    "batch_size": "Rows of a step, over all processes and parts.",
    "accumulation": "Parts that a batch is computed in, one after the other, to save memory.",
    "learning_rate": "At its highest; by default 5e-5 for all weights, 2e-4 for LoRA, 1e-2 for a prefix, "
    "1e-3 for a head.",
    "optimizer": "adamw-8bit needs bitsandbytes.",
    "schedule": "How the learning rate falls after the warm-up.",
    "warmup": "Share of all steps in which the learning rate rises.",
    "weight_decay": "Of the optimizer; norms and biases have none.",
    "dropout": "In place of the model's own rates.",
    "label_smoothing": "Share of the target that all classes have alike.",
    "class_weights": "balanced makes rare classes count as much as common ones.",
    "max_grad_norm": "Gradients are scaled down to it; 0 leaves them.",
    "precision": "Of products; weights and optimizer stay fp32. fp16 needs a GPU.",
    "gradient_checkpointing": "Compute activations again rather than keep them, to save memory.",
    "max_length": "Most tokens of an example; by default what the model takes, up to 512.",
    "stride": "Tokens that neighbouring windows of a long text share.",
    "method": "What learns: all weights, the head, the last layers, an adapter that is merged in at the end, "
    "or a prefix of keys and values (decoders).",
    "last_layers": "How many layers learn with --method last-layers.",
    "rank": "Of LoRA and DoRA.",
    "alpha": "Of LoRA and DoRA: an adapter counts alpha / rank times.",
    "adapter_dropout": "Of LoRA and DoRA.",
    "prefix_tokens": "How many keys and values each layer has with --method prefix.",
    "prefix_projection": "Have a network of two layers make the prefix while it learns, which is steadier.",
    "metric": "Chooses the best weights; by default the task's main one. loss is one of every task.",
    "patience": "Stop after so many evaluations without a better metric.",
    "eval_steps": "Steps between evaluations on the dev rows; by default an epoch.",
    "save_steps": "Steps between checkpoints that --resume goes on from; by default --eval-steps.",
    "seed": "Of the head's first weights, the order of rows, and dropout.",
    "problem": "Of classification: one class, several at once, or a number; auto sees it from labels.",
    "temperature": "Of the contrastive loss of embeddings.",
    "instruction": "What a decoder is told before a text to translate or summarize.",
    "processes": "On this machine, which share each batch; --batch-size is that of all of them.",
    "shard": "Each process keeps a part of weights, gradients and optimizer state (FSDP), instead of all.",
    "tensor_parallel": "So many of --processes have a part each of the matrices; the rest share each batch.",
    "device": "Where to compute; auto is a GPU where there is one.",
    "keep_checkpoints": "Leave OUTPUT.run, with checkpoints and optimizer, when all is done.",
    "keep_zeros": "Zeros of the source's matrices stay zeros: a pruned model stays pruned.",
    "teacher": "A model that was tuned for the task, from whose outputs this one learns too.",
    "soft_weight": "Share of the loss that compares with the teacher's probabilities; the rest is of labels.",
    "soft_temperature": "That logits are divided by where they are compared with the teacher's.",
    "hidden_weight": "Of the squared error to the teacher's hidden states, which is added to the loss.",
    "attention_weight": "Of the squared error to the teacher's attention maps, which is added to the loss.",
    "teacher_processes": "On this machine, which share the examples that the teacher is asked about.",
    "layer_map": "The teacher's layer, from 0, that a layer is held to; given once for each layer.",
}


@click.command()
@click.argument("task", metavar="TASK", help="Such as text-classification; a wrong one lists all.")
@click.option("--model", required=True, metavar="NAME_OR_DIR", help="The pretrained model, as everywhere.")
@click.option("--train", required=True, type=click.Path(path_type=Path), help="File of training rows.")
@click.option("--dev", type=click.Path(path_type=Path), help="File of rows that choose the best weights.")
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="Folder to make; must not be there."
)
@click.option(
    "--config", type=click.Path(path_type=Path), help="TOML, YAML or JSON file of options; flags go first."
)
@on_problem_option
@click.option("--resume", is_flag=True, help="Go on with the unfinished run of this output, if there is one.")
@click.option(
    "--search",
    type=click.Path(path_type=Path),
    help="YAML, TOML or JSON file of options to search: lists of values, or {low, high, log}.",
)
@click.option("--trials", type=click.IntRange(1), help=f"Of --search; {_TRIALS} unless said.")
@pack_options("options", TuneOptions(), _HELP)
@json_option
@offline_option
def tune(
    task: str,
    model: str,
    train: Path,
    dev: Path | None,
    output: Path,
    config: Path | None,
    on_problem: Mapping[str, str],
    resume: bool,
    search: Path | None,
    trials: int | None,
    options: TuneOptions,
    json: bool,
    offline: bool,
) -> None:
    """Tune a pretrained model on labelled rows.

    OUTPUT is then a model directory with head and labels, a card of the training, and its curves. A run that
    was killed goes on with --resume, to the same weights.
    """
    from fastserve.tune.tuning import tune as run_tune

    if config is not None:
        options = _with_config(options, config)
    if offline:
        click.get_current_context().with_resource(network_forbidden())
    if search is not None:
        num_trials = trials or _TRIALS
        _search(
            task,
            model,
            train,
            dev,
            output,
            search,
            num_trials,
            options,
            on_problem,
            resume=resume,
            as_json=json,
        )
        return
    if trials is not None:
        raise OptionError("trials are of a search", hint="name its space: --search FILE", option="trials")
    with printed_problems() as report_problem, _progress(shown=not json) as report:
        result = run_tune(
            task,
            model=model,
            train=train,
            dev=dev,
            output=output,
            options=options,
            on_problem=on_problem,
            resume=resume,
            report=report,
            report_problem=report_problem,
        )
    if json:
        print_json(result.to_json())
    else:
        _print_result(result)


def _search(
    task: str,
    model: str,
    train: Path,
    dev: Path | None,
    output: Path,
    space: Path,
    trials: int,
    options: TuneOptions,
    on_problem: Mapping[str, str],
    *,
    resume: bool,
    as_json: bool,
) -> None:
    from fastserve.tune.search import read_space, search

    if dev is None:
        raise OptionError("search needs dev rows", hint="give them with --dev", option="search")
    with printed_problems() as report_problem, _progress(shown=not as_json) as report:
        result = search(
            task,
            model=model,
            train=train,
            dev=dev,
            output=output,
            space=read_space(space),
            trials=trials,
            options=options,
            on_problem=on_problem,
            resume=resume,
            report=report,
            report_problem=report_problem,
        )
    if as_json:
        print_json(result.to_json())
        return
    print(f"{result.num_complete} trials, {result.num_pruned} stopped early; the best has:")
    rows = [
        [name, str(value), f"{result.importance.get(name, 0):.2f}"]
        for name, value in result.best_options.items()
    ]
    print_table(["option", "value", "importance"], rows)
    _print_result(result.best)


def _with_config(options: TuneOptions, path: Path) -> TuneOptions:
    """The options of a file, where the command line does not set them."""
    context = click.get_current_context()
    stored = read_option_file(path)
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    given = {
        name for name in values if context.get_parameter_source(name) not in (None, ParameterSource.DEFAULT)
    }
    return TuneOptions(**{**values, **{name: value for name, value in stored.items() if name not in given}})


@contextmanager
def _progress(*, shown: bool) -> Iterator[Callable[[Progress], None] | None]:
    """A bar on a terminal with the figures logged last; None where none is to be drawn."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    bar: Any = tqdm(desc="tuning", unit="step", dynamic_ncols=True)

    def report(progress: Progress) -> None:
        bar.total = progress.num_steps
        names = ("loss", "eval_loss", "eval_f1", "eval_accuracy")
        bar.set_postfix(
            {n: f"{progress.figures[n]:.4g}" for n in names if n in progress.figures}, refresh=False
        )
        if progress.step < bar.n:  # the next trial of a search
            bar.reset(total=progress.num_steps)
        bar.update(progress.step - bar.n)

    try:
        yield report
    finally:
        bar.close()


def _print_result(result: TuneResult) -> None:
    for kind, number in result.problems.items():
        print(f"{number} x {kind}")
    if result.num_cut:
        print(f"{result.num_cut} training rows were longer than --max-length, and were cut")
    if result.metrics:
        rows = [[name, f"{value:.4f}"] for name, value in sorted(result.metrics.items())]
        print_table(["metric", "dev rows"], rows)
    kept = f"the last weights, of step {result.num_steps}"
    if result.best_step is not None:
        kept = f"the weights of step {result.best_step} of {result.num_steps}, the best by {result.metric}"
    print(f"{result.path}: {kept}; {result.seconds:.0f} s")
