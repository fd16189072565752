"""Where two models differ: by layer, by token, and in the answers that flip."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastserve.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastserve.checkpoint.conversion import describe
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.rounding import row_pieces
from fastserve.checkpoint.tensor import StoredTensor
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.compress.batch_state import TokenBatch, make_batches, run_nodes
from fastserve.compress.calibration import graph_of, torch_threads
from fastserve.compress.model_kind import writes_text
from fastserve.compress.quality import WINDOWS, read_texts, silent
from fastserve.compress.step import WorkingModel
from fastserve.data.load import load_data
from fastserve.data.row import texts_of
from fastserve.errors import DataError, UnsupportedError
from fastserve.evaluate.bootstrap import Interval
from fastserve.evaluate.language_model import Difference, LanguageModel, compare_models, read_windows
from fastserve.evaluate.prediction import PredictorOptions
from fastserve.evaluate.task.table import task_of_folder
from fastserve.evaluate.task.task import place_of
from fastserve.evaluate.task_evaluation import compare, evaluate_folder
from fastserve.graph.node import Graph, Linear, Value
from fastserve.models.family import arrange_tensors, read_config
from fastserve.types import JsonObject

Progress = Callable[[str, int, int], None]

_OUTPUT_TOKENS = 512  # that the outputs of layers are compared on
_SHOWN = 20
_CONTEXT_TOKENS = 8


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """Of one matrix.

    Attributes:
        stored, other_stored: what it is stored as.
        weights: squared norm of the difference over that of the first model's; None where shapes differ.
        outputs: the same of what it gives, each model by itself, on the text; None where not compared.
    """

    name: str
    stored: str
    other_stored: str
    weights: float | None
    outputs: float | None = None


@dataclass(frozen=True, slots=True)
class TokenDifference:
    """A position at which predictions are far apart: what comes before, what follows, and what each model
    thinks likeliest."""

    before: str
    follows: str
    predicted: str
    other_predicted: str
    kl: float


@dataclass(frozen=True, slots=True)
class Flip:
    """A row that the models answer differently."""

    place: str
    text: str
    right: str
    answer: str
    other_answer: str


@dataclass(frozen=True, kw_only=True)
class ModelDifference:
    """
    Attributes:
        layers: in order.
        only, other_only: tensors that only one of them has.
        figures: of predictions: `mean_kl`, `top1_agreement`, perplexities, or the metrics of a task with how
            much more the second model has.
        tokens: the furthest apart, of text.
        flips: of labelled rows; `num_flips` is of all.
    """

    layers: tuple[LayerDifference, ...]
    only: tuple[str, ...] = ()
    other_only: tuple[str, ...] = ()
    judged_by: str | None = None
    figures: dict[str, Interval] = field(default_factory=dict)
    tokens: tuple[TokenDifference, ...] = ()
    flips: tuple[Flip, ...] = ()
    num_flips: int = 0

    def to_json(self) -> JsonObject:
        return {
            **asdict(self),
            "figures": {name: interval.to_json() for name, interval in self.figures.items()},
        }


def find_differences(
    one: Path,
    other: Path,
    data: Path | None = None,
    *,
    limit: int | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> ModelDifference:
    """Compare two models: the numbers of the first are exact (float32), the second is as it is served.

    Args:
        data: text, or rows of the models' task, on which outputs and answers are compared too.
        limit: of windows of text, or rows.

    Raises:
        UnsupportedError: they are not of one kind, or of one vocabulary.
        DataError: the file has too little.
    """
    first, second = open_checkpoint(one), open_checkpoint(other)
    kinds = [writes_text(checkpoint) for checkpoint in (first, second)]
    if kinds[0] is not kinds[1]:
        raise UnsupportedError(
            f"{one} and {other} are not of one kind", hint="compare two that write text, or two that read it"
        )
    configs = [read_config(checkpoint.config) for checkpoint in (first, second)]
    has_one_vocabulary = configs[0].vocab_size == configs[1].vocab_size
    if kinds[0] and data is not None and not has_one_vocabulary:
        sizes = " and ".join(str(config.vocab_size) for config in configs)
        raise UnsupportedError(
            f"{one} and {other} have vocabularies of {sizes} tokens",
            hint="leave --data out to compare their weights, or compare models of one tokenizer",
        )
    names = {name for name, tensor in first.tensors.items() if len(tensor.shape) == 2}
    layers = tuple(
        LayerDifference(
            name,
            describe(first.tensors[name]),
            describe(second.tensors[name]),
            _relative_error(first.tensors[name], second.tensors[name]),
        )
        for name in first.tensors
        if name in names and name in second.tensors
    )
    found = ModelDifference(
        layers=layers,
        only=tuple(name for name in first.tensors if name not in second.tensors),
        other_only=tuple(name for name in second.tensors if name not in first.tensors),
    )
    if data is None:
        return found
    narrow = min((first, second), key=lambda checkpoint: read_config(checkpoint.config).max_context)
    if has_one_vocabulary:
        tokens = _first_tokens(narrow, data)
        found = replace(found, layers=_with_outputs(layers, first, second, tokens, threads, progress))
    values = vars(found)
    if kinds[0]:
        windows = read_windows(narrow, (f"{text}\n" for text in read_texts(data)), most=limit or WINDOWS)
        return ModelDifference(**(values | _by_tokens(first, other, windows, threads, progress)))
    return ModelDifference(**(values | _by_rows(one, other, data, limit, threads)))


def _relative_error(one: StoredTensor, other: StoredTensor) -> float | None:
    if one.shape != other.shape:
        return None
    whole = difference = 0.0
    for begin, end in row_pieces(one.shape):
        values = to_f32(one.rows(begin, end)).astype(np.float64)
        whole += float(np.square(values).sum())
        difference += float(np.square(to_f32(other.rows(begin, end)) - values).sum())
    return difference / whole if whole else 0.0


def _with_outputs(
    layers: tuple[LayerDifference, ...],
    one: Checkpoint,
    other: Checkpoint,
    tokens: Sequence[int],
    threads: int | None,
    progress: Progress,
) -> tuple[LayerDifference, ...]:
    """With what matrices give on some tokens, where both models have the same nodes."""
    models = [WorkingModel(checkpoint=checkpoint) for checkpoint in (one, other)]
    graphs = [graph_of(model) for model in models]
    if [type(node) for node in graphs[0].nodes] != [type(node) for node in graphs[1].nodes]:
        return layers
    (batch,) = make_batches([tokens])[:1]
    outputs: dict[str, float] = {}
    with torch_threads(threads), torch.inference_mode():
        walks = (_linear_outputs(g, m, batch) for g, m in zip(graphs, models, strict=True))
        for index, ((name, expected), (_, actual)) in enumerate(zip(*walks, strict=True)):
            if expected.shape == actual.shape:
                whole = float(expected.square().sum())
                outputs[name] = float((actual - expected).square().sum()) / whole if whole else 0.0
            progress("layers", index + 1, len(layers))
    return tuple(replace(layer, outputs=outputs.get(layer.name)) for layer in layers)


def _linear_outputs(
    graph: Graph, model: WorkingModel, batch: TokenBatch
) -> Iterator[tuple[str, torch.Tensor]]:
    """What each linear gives, in order; the parameters of one node are in memory at a time."""
    tensors = arrange_tensors(read_config(model.config), model.tensors)
    values: dict[Value, torch.Tensor] = {}
    for position, node in enumerate(graph.nodes):
        weights = {
            parameter: torch.cat([torch.from_numpy(to_f32(tensors[name]).copy()) for name in parameter.names])
            for parameter in node.parameters()
        }
        run_nodes(graph, position, position + 1, batch, weights, values)
        if isinstance(node, Linear):
            yield node.weight.names[0], values[node.out]


def _first_tokens(checkpoint: Checkpoint, data: Path) -> list[int]:
    """Of the file's texts, as the model reads them."""
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    room = min(_OUTPUT_TOKENS, read_config(checkpoint.config).max_context)
    ids: list[int] = []
    for text in read_texts(data):
        ids += tokenizer.encode(text, add_special_tokens=not ids)
        if len(ids) >= room:
            break
    if not ids:
        raise DataError(f"{data} has no text", hint="give a file with text")
    return ids[:room]


def _by_tokens(
    one: Checkpoint,
    other: Path,
    windows: Sequence[Sequence[int]],
    threads: int | None,
    progress: Progress,
) -> dict[str, Any]:
    tokenizer = Tokenizer.from_checkpoint(one)
    found = compare_models(
        LanguageModel(one, weights="f32", kv_dtype="f32", threads=threads),
        LanguageModel(other, threads=threads),
        windows,
        progress=lambda done: progress("tokens", done, len(windows)),
    )
    worst = np.argsort(-found.kl, kind="stable")[:_SHOWN]
    flipped = found.is_clear & ~found.is_same
    return {
        "judged_by": f"{len(windows)} windows of {len(windows[0])} tokens",
        "figures": found.figures(),
        "num_flips": int(flipped.sum()),
        "tokens": tuple(_token_difference(tokenizer, windows, found, int(index)) for index in worst),
    }


def _token_difference(
    tokenizer: Tokenizer, windows: Sequence[Sequence[int]], found: Difference, index: int
) -> TokenDifference:
    before = _before(windows, found.starts.tolist(), index)
    text = tokenizer.decode(before)

    def after(token_id: Any) -> str:
        """What a token adds to the text: its space before it, too."""
        return tokenizer.decode([*before, int(token_id)])[len(text) :]

    return TokenDifference(
        before=text,
        follows=after(found.token_ids[index]),
        predicted=after(found.predicted[index]),
        other_predicted=after(found.other_predicted[index]),
        kl=float(found.kl[index]),
    )


def _before(windows: Sequence[Sequence[int]], starts: list[int], index: int) -> Sequence[int]:
    """The last tokens before a position of `Difference`."""
    for window, (start, end) in zip(windows, pairwise(starts), strict=True):
        if index < end:
            position = index - start + 1
            return window[max(position - _CONTEXT_TOKENS, 0) : position]
    raise AssertionError(f"no window has position {index}")


def _by_rows(one: Path, other: Path, data: Path, limit: int | None, threads: int | None) -> dict[str, Any]:
    task = task_of_folder(one)
    rows = list(load_data(data, task.name))[:limit]
    if not rows:
        raise DataError(f"{data} has no rows", hint="give a file with rows")
    options = PredictorOptions(threads=threads, truncate=True)
    exact = PredictorOptions(weights="f32", threads=threads, truncate=True)
    first, second = evaluate_folder(one, rows, exact), evaluate_folder(other, rows, options)
    figures = compare(second, first, rows, resamples=200, seed=0)
    answers = [(_answer(a), _answer(b)) for a, b in zip(first.predictions, second.predictions, strict=True)]
    flips = [index for index, (a, b) in enumerate(answers) if a != b]
    return {
        "judged_by": f"{len(rows)} rows of {task.name}",
        "figures": figures,
        "num_flips": len(flips),
        "flips": tuple(
            Flip(
                place=place_of(rows[index]),
                text=" | ".join(texts_of(rows[index]))[:120],
                right=_right(rows[index]),
                answer=answers[index][0],
                other_answer=answers[index][1],
            )
            for index in flips[:_SHOWN]
        ),
    }


def _answer(prediction: Any) -> str:
    """What a prediction comes to, for people."""
    for name in ("label", "labels", "tags", "answer", "text", "index", "choice", "value"):
        if name in prediction:
            value = prediction[name]
            return f"{value:.3g}" if isinstance(value, float) else str(value)
    return ""


def _right(row: Any) -> str:
    """What a row says itself."""
    names = ("label", "labels", "tags", "answers", "target")
    return next((str(row[name]) for name in names if name in row), "")
