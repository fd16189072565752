"""How well a language model predicts given texts, and how far two models' predictions are apart: perplexity,
KL divergence and agreement of the likeliest token, teacher-forced, on the native runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastserve.backends.native.executable import compile_native
from fastserve.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.config import KvDtype, WeightsChoice
from fastserve.engine.footprint import BLOCK_SIZE
from fastserve.errors import DataError, UnsupportedError
from fastserve.evaluate.bootstrap import Interval, bootstrap
from fastserve.graph.passes import optimize
from fastserve.models.config import DecoderConfig
from fastserve.models.family import arrange_tensors, build_graph, read_config
from fastserve.types import Batch, BoolArray, Float32Array, Float64Array, Int64Array, Limits

WINDOW_TOKENS = 512
NEAR_TIE = 0.1  # nats between the two likeliest tokens: where rounding may decide between them

_STEP_BYTES = 2**25  # of the logits of one step
_MOST_LOSS = 700.0  # whose exponential is still a number


class LanguageModel:
    """A decoder on the native runtime that gives its logits at every position of a given text.

    Args:
        model: a folder, a .gguf file, or a checkpoint, be its tensors in memory.
        weights: as it is to run; `auto` is what it is served as.
        window: most tokens of one text.

    Raises:
        UnsupportedError: the model writes no text, or has something that we do not compute.
        CheckpointError: it cannot be read.

    >>> model = LanguageModel(Path("models/stories260K"), weights="f32")  # doctest: +SKIP
    >>> perplexity(model, [[1, 403, 407, 261]]).value  # doctest: +SKIP
    12.9
    """

    def __init__(
        self,
        model: Path | Checkpoint,
        *,
        weights: WeightsChoice = "auto",
        kv_dtype: KvDtype = "f16",
        threads: int | None = None,
        window: int = WINDOW_TOKENS,
    ) -> None:
        checkpoint = open_checkpoint(model) if isinstance(model, Path) else model
        config = read_config(checkpoint.config)
        if not isinstance(config, DecoderConfig):
            raise UnsupportedError(
                f"{checkpoint.path} writes no text, so that it has no perplexity",
                hint="judge it by a task, on labelled rows",
            )
        self.window = min(window, config.max_context)
        tensors = arrange_tensors(config, checkpoint.tensors)
        step = min(WINDOW_TOKENS, max(_STEP_BYTES // (4 * config.vocab_size), 1))
        num_blocks = -(-self.window // BLOCK_SIZE)
        self._step = step
        self._blocks = np.arange(num_blocks, dtype=np.int32)[None]
        self._executable = compile_native(
            optimize(build_graph(config.for_context(self.window), tensors.keys())),
            tensors,
            weights="int8" if weights == "auto" else weights,
            kv_dtype=kv_dtype,
            threads=threads,
            limits=Limits(
                max_tokens=step,
                max_outputs=step,
                max_sequences=1,
                num_blocks=num_blocks,
                max_context=self.window,
            ),
        )

    def logits(self, token_ids: Seq[int]) -> Iterator[Float32Array]:
        """Logits [some tokens, vocab] at all positions of one text, piece after piece; each is overwritten by
        the next."""
        assert 0 < len(token_ids) <= self.window
        for begin in range(0, len(token_ids), self._step):
            yield self._run(token_ids[begin : begin + self._step], begin)

    def greedy(self, token_ids: Seq[int], max_tokens: int) -> list[int]:
        """The likeliest tokens that go on from a text, whatever ends it; with it they fit the window."""
        assert max_tokens > 0
        assert len(token_ids) + max_tokens <= self.window
        for logits in self.logits(token_ids):
            last = logits[-1]
        chosen = [int(last.argmax())]
        while len(chosen) < max_tokens:
            last = self._run(chosen[-1:], len(token_ids) + len(chosen) - 1)[-1]
            chosen.append(int(last.argmax()))
        return chosen

    def _run(self, token_ids: Seq[int], begin: int) -> Float32Array:
        """Logits of tokens at the positions from `begin` on, those before them having been run."""
        count = len(token_ids)
        batch = Batch(
            token_ids=np.asarray(token_ids, np.int32),
            positions=np.arange(begin, begin + count, dtype=np.int32),
            sequence_starts=np.asarray([0, count], np.int32),
            context_lengths=np.asarray([begin + count], np.int32),
            block_tables=self._blocks,
            output_rows=np.arange(count, dtype=np.int32),
        )
        return self._executable.run(batch).outputs["logits"]

    def losses(self, token_ids: Seq[int]) -> Float64Array:
        """-log p of each token after the first, given those before it, in nats: [tokens - 1]."""
        targets = np.asarray(token_ids[1:], np.int64)
        found, begin = [], 0
        for logits in self.logits(token_ids):
            chosen = targets[begin : begin + len(logits)]
            found.append(-log_softmax(logits[: len(chosen)])[np.arange(len(chosen)), chosen])
            begin += len(logits)
        return np.concatenate(found)


@dataclass(frozen=True, slots=True)
class Difference:
    """Two models at the same positions: in order of the windows, of each all tokens but its last.

    Attributes:
        starts: of each window [windows + 1], its range in the other arrays.
        token_ids: what follows [tokens].
        losses, other_losses: -log p of it by the one and the other, in nats.
        kl: KL(one || other) of the predictions, in nats.
        is_clear: whether the one's likeliest token is more than `NEAR_TIE` nats before its second.
        predicted, other_predicted: the likeliest tokens.
    """

    starts: Int64Array
    token_ids: Int64Array
    losses: Float64Array
    other_losses: Float64Array
    kl: Float64Array
    is_clear: BoolArray
    predicted: Int64Array
    other_predicted: Int64Array

    @property
    def is_same(self) -> BoolArray:
        same: BoolArray = self.predicted == self.other_predicted
        return same

    def figures(self, *, resamples: int = 1000, seed: int = 0) -> dict[str, Interval]:
        """Perplexities, how much larger the other's is (a ratio less 1), mean KL and agreements of the
        likeliest token, each with the interval that a bootstrap over windows gives."""
        sums = np.stack(
            [
                np.add.reduceat(values.astype(np.float64), self.starts[:-1])
                for values in (
                    np.ones(len(self.kl)),
                    self.losses,
                    self.other_losses,
                    self.kl,
                    self.is_same,
                    self.is_clear,
                    self.is_same & self.is_clear,
                )
            ]
        )  # [figures, windows]

        def measure(rows: Int64Array) -> dict[str, float]:
            count, loss, other, kl, same, clear, same_clear = sums[:, rows].sum(axis=1)
            return {
                "perplexity": _exp(loss / count),
                "other_perplexity": _exp(other / count),
                "perplexity_increase": _exp((other - loss) / count) - 1,
                "mean_kl": kl / count,
                "top1_agreement": same / count,
                "top1_agreement_outside_ties": same_clear / clear if clear else 1.0,
            }

        return bootstrap(measure, sums.shape[1], resamples=resamples, seed=seed)


def compare_models(
    one: LanguageModel,
    other: LanguageModel,
    windows: Seq[Seq[int]],
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> Difference:
    """Run both models on the same windows of tokens. `progress` is told how many are done.

    Raises:
        UnsupportedError: their vocabularies are not of one size.
    """
    parts: dict[str, list[Any]] = {name: [] for name in Difference.__dataclass_fields__}
    for index, window in enumerate(windows):
        targets = np.asarray(window[1:], np.int64)
        num_tokens = 0
        for logits, others in _side_by_side(one, other, window):
            chosen = targets[num_tokens : num_tokens + len(logits)]
            if not len(chosen):
                break
            expected, actual = log_softmax(logits[: len(chosen)]), log_softmax(others[: len(chosen)])
            rows = np.arange(len(chosen))
            best = np.partition(expected, -2, axis=1)[:, -2:]
            parts["token_ids"].append(chosen)
            parts["losses"].append(-expected[rows, chosen])
            parts["other_losses"].append(-actual[rows, chosen])
            parts["kl"].append(kl_divergence(expected, actual))
            parts["is_clear"].append(best[:, 1] - best[:, 0] > NEAR_TIE)
            parts["predicted"].append(expected.argmax(axis=1))
            parts["other_predicted"].append(actual.argmax(axis=1))
            num_tokens += len(chosen)
        parts["starts"].append(len(targets))
        progress(index + 1)
    starts = np.concatenate([[0], np.cumsum(parts.pop("starts"))]).astype(np.int64)
    return Difference(
        starts=starts, **{name: np.concatenate(values) for name, values in parts.items() if name != "starts"}
    )


def perplexity(
    model: LanguageModel, windows: Seq[Seq[int]], *, resamples: int = 1000, seed: int = 0
) -> Interval:
    """exp of the mean loss of all tokens but the first of each window, by a bootstrap over windows."""
    sums = np.array([(losses.sum(), len(losses)) for losses in map(model.losses, windows)])

    def measure(rows: Int64Array) -> dict[str, float]:
        loss, count = sums[rows].sum(axis=0)
        return {"perplexity": _exp(loss / count)}

    return bootstrap(measure, len(windows), resamples=resamples, seed=seed)["perplexity"]


def read_windows(
    checkpoint: Checkpoint,
    texts: Path | Iterable[str],
    *,
    length: int = WINDOW_TOKENS,
    most: int | None = None,
) -> list[list[int]]:
    """The tokens of a text, cut into windows of `length`: a plain file or texts, which follow each other.

    Only as much of a file is encoded as `most` windows can need. What is left over at the end is a window of
    its own where it has half the length, or is the only one.

    Raises:
        DataError: the file cannot be read, or there are fewer than two tokens.
    """
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    length = min(length, int(checkpoint.config.get("max_position_embeddings") or length))
    pieces = _pieces(texts) if isinstance(texts, Path) else iter(texts)
    ids: list[int] = []
    for piece in pieces:
        ids += tokenizer.encode(piece, add_special_tokens=False)
        if most is not None and len(ids) >= most * length:
            break
    windows = [ids[begin : begin + length] for begin in range(0, len(ids), length)][:most]
    if len(windows) > 1 and len(windows[-1]) < max(length // 2, 2):
        windows.pop()
    if not windows or len(windows[0]) < 2:
        where = texts if isinstance(texts, Path) else "the text"
        raise DataError(f"{where} has {len(ids)} tokens; at least 2 are needed", hint="give more text")
    return windows


def log_softmax(logits: Float32Array) -> Float64Array:
    """Natural-log probabilities [rows, vocab]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_probs: Float64Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return log_probs


def kl_divergence(expected: Float64Array, actual: Float64Array) -> Float64Array:
    """KL(expected || actual) [rows] in nats, from log probabilities [rows, vocab]."""
    divergence: Float64Array = np.einsum("rv,rv->r", np.exp(expected), expected - actual)
    return divergence


_PIECE_CHARACTERS = 2**20  # of a file that are encoded at once


def _pieces(path: Path) -> Iterator[str]:
    """A text file in pieces that end at a line's end."""
    try:
        with path.open(encoding="utf-8") as file:
            for lines in iter(partial(file.readlines, _PIECE_CHARACTERS), []):
                yield "".join(lines)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not valid UTF-8", hint="convert it first") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _side_by_side(
    one: LanguageModel, other: LanguageModel, window: Seq[int]
) -> Iterator[tuple[Float32Array, Float32Array]]:
    """Logits of both at the same rows."""
    for logits, others in zip(one.logits(window), other.logits(window), strict=True):
        if logits.shape != others.shape:
            sizes = f"{logits.shape[1]} and {others.shape[1]}"
            raise UnsupportedError(
                f"the models have vocabularies of {sizes} tokens",
                hint="compare models of one tokenizer",
            )
        yield logits, others


def _exp(loss: float) -> float:
    return math.exp(min(loss, _MOST_LOSS))
