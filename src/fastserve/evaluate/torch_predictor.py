"""Predictions by `transformers` on PyTorch: of what the native runtime does not have, and to compare it
with."""

from __future__ import annotations

import os
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.evaluate.embedding_model import EmbeddingModel
from fastserve.evaluate.prediction import PredictorOptions, check_not_cut
from fastserve.evaluate.prefixed_model import put_behind_prefix
from fastserve.evaluate.task.embedding import Embedding
from fastserve.evaluate.task.generation import Generation, render
from fastserve.evaluate.task.task import Prediction, Row, Task, place_of
from fastserve.evaluate.torch_model import reduction_of, run_examples
from fastserve.models.pooling import Pooling

_BATCH_SIZE = 32


class TorchPredictor:
    """A model directory opened by `transformers`. What it writes for a row is greedy."""

    backend = "torch"

    def __init__(self, folder: Path, task: Task, options: PredictorOptions) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._task, self._options = task, options
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        # Stored settings of the script that trained it (MiniLM's cuts at 128 and pads).
        self._tokenizer.backend_tokenizer.no_truncation()
        self._tokenizer.backend_tokenizer.no_padding()
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        kind = getattr(transformers, f"AutoModel{task.model_class}")
        model = kind.from_pretrained(folder, dtype=torch.float32)
        if isinstance(task, Embedding):
            sentence = open_checkpoint(folder).sentence
            pooling = Pooling()
            if sentence is not None:
                pooling = Pooling.from_sentence_transformers(sentence.modules, sentence.pooling)
            model = EmbeddingModel(model, pooling)
        self._model: Any = put_behind_prefix(model, folder).eval()
        self.num_tokens = 0

    def predict(self, rows: Seq[Row]) -> list[Prediction]:
        is_scored = isinstance(self._task, Generation)
        examples = self._task.encode(rows, self._tokenizer, with_labels=is_scored)
        check_not_cut(examples.num_cut, getattr(self._task, "max_length", 0), self._options)
        logits, _ = run_examples(
            self._model,
            examples.features,
            pad_token_id=self._tokenizer.pad_token_id,
            batch_size=4 if is_scored else _BATCH_SIZE,
            reduce=reduction_of(self._task),
        )
        self.num_tokens += sum(np.size(features["input_ids"]) for features in examples.features)
        predictions = self._task.decode(rows, examples, logits)
        if isinstance(self._task, Generation) and self._task.name != "causal-lm":
            for row, prediction in zip(rows, predictions, strict=True):
                prediction["text"] = self._write(self._task, row)
        return predictions

    def close(self) -> None:
        self._model = None

    def _write(self, task: Generation, row: Row) -> str:
        if task.is_encoder_decoder:
            encoded = self._tokenizer(task.source_of(row), return_tensors="pt")
        else:
            text, answers = render(task.messages_of(row), self._tokenizer, place_of(row))
            prompt = text[: answers[-1][0]]
            encoded = self._tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        encoded = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            ids = self._model.generate(
                **encoded,
                max_new_tokens=self._options.max_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=self._tokenizer.pad_token_id,
            )[0]
        self.num_tokens += len(ids)
        if task.is_encoder_decoder:
            self.num_tokens += encoded["input_ids"].shape[1]
        else:
            ids = ids[encoded["input_ids"].shape[1] :]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()
