"""One vector a text, so that texts that belong together are near each other."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastserve.evaluate.correlation import pearson, spearman
from fastserve.evaluate.task.task import Examples, Features, Prediction, Row, Scores
from fastserve.evaluate.task.text_classification import encode_text
from fastserve.types import Float32Array, JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """`{"text", "text_pair"}`, which belong together, or with a number as `label`, how near they are.

    Without labels, the other pairs of a batch are what does not belong, and `recall@1` is how often a text's
    own pair is the nearest among all; with labels, scores are correlations with the cosine.
    """

    max_length: int
    has_labels: bool = False

    name = "embedding"
    model_class = ""
    labels = ()

    @classmethod
    def from_rows(cls, rows: Seq[Row], *, max_length: int) -> Embedding:
        return cls(max_length=max_length, has_labels="label" in rows[0])

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("spearman", "pearson", "loss") if self.has_labels else ("recall@1", "mrr", "loss")

    def encode(self, rows: Seq[Row], tokenizer: Any, *, with_labels: bool) -> Examples:
        examples = Examples()
        for index, row in enumerate(rows):
            first = encode_text(tokenizer, [row["text"]], self.max_length, examples)
            second = encode_text(tokenizer, [row["text_pair"]], self.max_length, examples)
            features: Features = {name: first[name] for name in ("input_ids", "attention_mask")}
            features |= {f"pair_{name}": second[name] for name in ("input_ids", "attention_mask")}
            if with_labels:
                features["labels"] = float(row["label"]) if self.has_labels else 1.0
            examples.add(index, features)
        return examples

    def decode(self, rows: Seq[Row], examples: Examples, logits: Seq[Float32Array]) -> list[Prediction]:
        return [{"embedding": values[0], "pair_embedding": values[1]} for values in logits]

    def score(self, rows: Seq[Row], predictions: Seq[Prediction]) -> Scores:
        first = np.stack([np.asarray(prediction["embedding"]) for prediction in predictions])
        second = np.stack([np.asarray(prediction["pair_embedding"]) for prediction in predictions])
        first, second = (x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12) for x in (first, second))
        if self.has_labels:
            cosines = (first * second).sum(axis=1).tolist()
            gold = [float(row["label"]) for row in rows]
            return Scores({"spearman": spearman(gold, cosines), "pearson": pearson(gold, cosines)})
        similarity = first @ second.T
        ranks = 1 + (similarity > np.diag(similarity)[:, None]).sum(axis=1)
        return Scores({"recall@1": float((ranks == 1).mean()), "mrr": float((1 / ranks).mean())})

    def config(self) -> JsonObject:
        return {}

    def settings(self) -> JsonObject:
        return {"max_length": self.max_length}
