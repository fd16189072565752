"""What makes predictions for rows: the native runtime, or PyTorch where it does not have the model."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastserve.checkpoint.file import read_optional_json
from fastserve.engine.ensemble import open_ensemble
from fastserve.errors import ContextLengthError, UnsupportedError
from fastserve.evaluate.label_tokenizer import LabelTokenizer
from fastserve.evaluate.prediction import Predictor, PredictorOptions, check_not_cut
from fastserve.evaluate.task.embedding import Embedding
from fastserve.evaluate.task.generation import Generation
from fastserve.evaluate.task.table import SETTINGS_FILE
from fastserve.evaluate.task.task import IGNORED, Prediction, Row, Task


def open_predictor(
    folder: Path, task: Task, options: PredictorOptions, *, note: Callable[[str], None]
) -> Predictor:
    """Open a model directory for its task; `note` is told why PyTorch is taken where it is not asked for.

    Raises:
        UnsupportedError: neither has the model.
    """
    if options.backend == "torch":
        return _open_torch(folder, task, options)
    try:
        return _open_native(folder, task, options)
    except UnsupportedError as error:
        if options.backend == "native" or open_ensemble(folder) is not None:
            raise
        note(f"the native runtime does not have this model ({error.message}); PyTorch computes")
        return _open_torch(folder, task, options)


def _open_native(folder: Path, task: Task, options: PredictorOptions) -> Predictor:
    if isinstance(task, Generation):
        from fastserve.engine.llm import LLM

        return _NativeGenerator(LLM(folder, weights=options.weights, threads=options.threads), task, options)
    from fastserve.engine.pipeline import pipeline

    # As tuned, so that longer rows are told; of an ensemble each member has a length of its own.
    is_single = open_ensemble(folder) is None
    length = read_optional_json(folder / SETTINGS_FILE).get("max_length") if is_single else None
    opened = pipeline(
        task.name, folder, weights=options.weights, threads=options.threads, context_length=length
    )
    return _NativePredictor(opened, task, options)


def _open_torch(folder: Path, task: Task, options: PredictorOptions) -> Predictor:
    if open_ensemble(folder) is not None:
        raise UnsupportedError(
            f"{folder} is an ensemble, which PyTorch does not open",
            hint="leave out --backend torch, or name one of the folders in it",
        )
    from fastserve.evaluate.torch_predictor import TorchPredictor

    return TorchPredictor(folder, task, options)


@dataclass(frozen=True, slots=True)
class _NativePredictor:
    _pipeline: Any
    _task: Task
    _options: PredictorOptions

    backend = "native"

    @property
    def num_tokens(self) -> int:
        return int(self._pipeline.num_tokens)

    def predict(self, rows: Seq[Row]) -> list[Prediction]:
        try:
            return self._predict(rows)
        except ContextLengthError as error:
            raise ContextLengthError(
                error.message, hint="split the text, or cut it with --truncate"
            ) from error

    def _predict(self, rows: Seq[Row]) -> list[Prediction]:
        found = list(self._pipeline.predict(rows, truncate=self._options.truncate))
        if isinstance(self._task, Embedding):
            pairs = [{"text": row["text_pair"]} for row in rows]
            others = self._pipeline.predict(pairs, truncate=self._options.truncate)
            for prediction, other in zip(found, others, strict=True):
                prediction["pair_embedding"] = other["embedding"]
        return found

    def close(self) -> None:
        self._pipeline.close()


@dataclass(slots=True)
class _NativeGenerator:
    """Losses of what is to be written, of decoders, and greedy completions of an LLM: of the chat before the
    last answer, or of a source, which an encoder-decoder reads as it is."""

    _llm: Any
    _task: Generation
    _options: PredictorOptions
    num_tokens: int = 0

    backend = "native"

    def predict(self, rows: Seq[Row]) -> list[Prediction]:
        from fastserve.types import SamplingParams

        # An encoder-decoder's decoder reads nothing that is given but what it begins with.
        predictions = [{} for _ in rows] if self._task.is_encoder_decoder else self._score(rows)
        if self._task.name == "causal-lm":
            return predictions
        params = SamplingParams(max_tokens=self._options.max_tokens, temperature=0.0, num_beams=1)
        prompts = [self._prompt_of(row) for row in rows]
        completions = self._llm.generate(prompts, params)
        for prediction, completion in zip(predictions, completions, strict=True):
            prediction["text"] = completion.text.strip()
            self.num_tokens += completion.prompt_tokens + completion.completion_tokens
        return predictions

    def _score(self, rows: Seq[Row]) -> list[Prediction]:
        """Sums of losses, as the trainer's own evaluation has them."""
        from fastserve.types import SamplingParams

        model = self._llm.model
        tokenizer = LabelTokenizer(model.tokenizer, model.checkpoint.chat_template)
        task = replace(self._task, max_length=min(self._task.max_length, model.context_length))
        examples = task.encode(rows, tokenizer, with_labels=True)
        check_not_cut(examples.num_cut, task.max_length, self._options)
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        texts = [features["input_ids"] for features in examples.features]
        sums = []
        for features, scored in zip(examples.features, self._llm.generate(texts, params), strict=True):
            self.num_tokens += scored.prompt_tokens
            losses = [-token.logprob for token in scored.checked().prompt_logprobs]
            learned = [label != IGNORED for label in features["labels"][1:]]
            sums.append(np.array([np.dot(losses, learned), sum(learned)]))
        return task.decode(rows, examples, sums)

    def _prompt_of(self, row: Row) -> Any:
        if self._task.is_encoder_decoder:
            from fastserve.engine.prompt import encode_text

            source = self._task.source_of(row)
            truncate = self._options.truncate
            return encode_text(self._llm.model, source, truncate=True) if truncate else source
        messages = self._task.messages_of(row)[:-1]
        if self._llm.model.checkpoint.chat_template is not None:
            return self._llm.chat_prompt(messages)
        return "".join(f"{message['content']}\n" for message in messages)

    def close(self) -> None:
        self._llm.close()
