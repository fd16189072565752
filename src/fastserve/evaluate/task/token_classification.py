"""A tag for each token: named entities and the like."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastserve.data.tag_scheme import Span as TagSpan
from fastserve.data.tag_scheme import write_tags
from fastserve.engine.task.token_classification import entities_of_tags, word_offsets
from fastserve.errors import DataError
from fastserve.evaluate.classification import averages, figures_of_sets, micro_figures
from fastserve.evaluate.task.task import (
    IGNORED,
    Examples,
    Features,
    Prediction,
    Row,
    Scores,
    label_config,
    place_of,
    softmax,
)
from fastserve.types import Float32Array, JsonObject

Span = tuple[int, int, str]
"""Start, end and label of an entity: in tokens, or in characters of a text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenClassification:
    """`{"tokens", "tags"}`, or `{"text", "entities": [{"start", "end", "label"}]}` with offsets in
    characters.

    A token's tag is learned, and read, at its first piece. Sequences that are longer than a model takes are
    cut between tokens into windows that share `stride` pieces; each token counts in the window in which it
    has more around it. Scores are of whole entities: a prediction is right with both ends and its label.
    """

    labels: tuple[str, ...]
    max_length: int
    stride: int = 32

    name = "token-classification"
    model_class = "ForTokenClassification"
    metrics = ("f1", "precision", "recall", "f1_macro", "f1_weighted", "accuracy", "loss")

    @classmethod
    def from_rows(cls, rows: Seq[Row], *, max_length: int, stride: int = 32) -> TokenClassification:
        """The task that training rows pose: `O` and their tags in order.

        Raises:
            DataError: tags and tokens differ in number, or no row has an entity.
        """
        found = {tag for row in rows for tag in tagged_tokens(row)[1]}
        if not found - {"O"}:
            raise DataError("no training row has an entity", hint="give rows with tags other than O")
        return cls(labels=("O", *sorted(found - {"O"})), max_length=max_length, stride=stride)

    def encode(self, rows: Seq[Row], tokenizer: Any, *, with_labels: bool) -> Examples:
        examples = Examples()
        index_of = {label: index for index, label in enumerate(self.labels)}
        for row_index, row in enumerate(rows):
            tokens, tags = tagged_tokens(row, with_tags=with_labels)
            unknown = next((tag for tag in tags if tag not in index_of), None)
            if with_labels and unknown is not None:
                raise DataError(
                    f"{place_of(row)}: tag {unknown!r} is in no training row",
                    hint=f"tags are {', '.join(self.labels)}",
                )
            for features, words in self._windows(tokens, tokenizer):
                if with_labels:
                    features["labels"] = [IGNORED if word is None else index_of[tags[word]] for word in words]
                examples.add(row_index, features, words)
        return examples

    def decode(self, rows: Seq[Row], examples: Examples, logits: Seq[Float32Array]) -> list[Prediction]:
        best: list[dict[int, tuple[int, Float32Array]]] = [{} for _ in rows]
        for row_index, words, values in zip(examples.row_index, examples.notes, logits, strict=True):
            for place, word in enumerate(words):
                if word is not None:
                    # A token that two windows have is taken where fewer of its neighbours are cut off.
                    room = min(place, len(words) - place)
                    if room > best[row_index].get(word, (-1, None))[0]:
                        best[row_index][word] = room, values[place]
        return [self._prediction(row, found) for row, found in zip(rows, best, strict=True)]

    def score(self, rows: Seq[Row], predictions: Seq[Prediction]) -> Scores:
        # Models of others have labels in IO or IOBES; rows are IOB2 as `fastserve.data` reads them.
        tags = [tagged_tokens(row)[1] for row in rows]
        scheme = _scheme_of(set().union(*tags))
        gold = [_gold_spans(row, scheme) for row in rows]
        said = [_said_spans(row, prediction) for row, prediction in zip(rows, predictions, strict=True)]
        labels = sorted({span[2] for spans in (*gold, *said) for span in spans})
        figures = figures_of_sets(gold, said, labels, lambda span: span[2])
        micro = micro_figures(gold, said)
        metrics = {**averages(figures), "precision": micro.precision, "recall": micro.recall, "f1": micro.f1}
        pairs = [
            pair
            for right, prediction in zip(tags, predictions, strict=True)
            for pair in zip(self._as_labels(right, scheme), prediction["tags"], strict=True)
        ]
        metrics["accuracy"] = float(np.mean([right == said for right, said in pairs])) if pairs else 0.0
        return Scores(metrics, figures)

    def config(self) -> JsonObject:
        return label_config(self.labels)

    def settings(self) -> JsonObject:
        return {"max_length": self.max_length, "stride": self.stride, "tag_scheme": self._scheme()}

    def _scheme(self) -> str:
        return _scheme_of(self.labels)

    def _as_labels(self, tags: Seq[str], scheme: str) -> Seq[str]:
        """Tags of a scheme as the model writes them."""
        own = self._scheme()
        if own == scheme and own != "io":  # of which there are two, with I- and without
            return tags
        written = write_tags([TagSpan(*span) for span in entities_of_tags(tags, scheme)], len(tags), own)
        has_prefixes = any(label.startswith("I-") for label in self.labels)
        return [tag.removeprefix("I-") for tag in written] if own == "io" and not has_prefixes else written

    def _windows(self, tokens: Seq[str], tokenizer: Any) -> list[tuple[Features, list[int | None]]]:
        """Inputs, and of each piece the token whose first piece it is."""
        encoded = tokenizer(
            list(tokens),
            is_split_into_words=True,
            truncation=True,
            max_length=self.max_length,
            stride=min(self.stride, self.max_length // 4),
            return_overflowing_tokens=True,
        )
        windows = []
        names = [name for name in encoded if name in ("input_ids", "attention_mask", "token_type_ids")]
        for number in range(len(encoded["input_ids"])):
            words = encoded.word_ids(number)
            first = [
                word if word is not None and word != before else None
                for before, word in zip([None, *words], words, strict=False)
            ]
            windows.append(({name: encoded[name][number] for name in names}, first))
        return windows

    def _prediction(self, row: Row, found: dict[int, tuple[int, Float32Array]]) -> Prediction:
        offsets = None if "tokens" in row else word_offsets(row["text"])
        num_words = len(row["tokens"]) if offsets is None else len(offsets)
        tags, scores = ["O"] * num_words, [1.0] * num_words
        for word, (_, values) in found.items():
            shares = softmax(values)
            best = int(shares.argmax())
            tags[word], scores[word] = self.labels[best], float(shares[best])
        entities = []
        for start, end, label in entities_of_tags(tags, self._scheme()):
            entity: dict[str, Any] = {"label": label, "score": float(np.mean(scores[start:end]))}
            if offsets is None:
                entity |= {"first_token": start, "end_token": end}
            else:
                entity |= {"start": offsets[start][0], "end": offsets[end - 1][1]}
            entities.append(entity)
        return {"tags": tags, "entities": entities}


def _scheme_of(tags: Iterable[str]) -> str:
    """The scheme that tags, or labels, are in."""
    prefixes = {tag.partition("-")[0] for tag in tags if "-" in tag}
    if prefixes & {"E", "S", "L", "U"}:
        return "bmes" if "M" in prefixes else "iobes"
    return "iob2" if "B" in prefixes else "io"


def _gold_spans(row: Row, scheme: str) -> frozenset[Span]:
    """The entities of a row: in tokens, or in characters where it gives them so."""
    if "tokens" in row:
        return frozenset(entities_of_tags(tagged_tokens(row)[1], scheme))
    return frozenset((entity["start"], entity["end"], entity["label"]) for entity in row.get("entities", ()))


def _said_spans(row: Row, prediction: Prediction) -> frozenset[Span]:
    names = ("first_token", "end_token") if "tokens" in row else ("start", "end")
    return frozenset((e[names[0]], e[names[1]], e["label"]) for e in prediction["entities"])


def tagged_tokens(row: Row, *, with_tags: bool = True) -> tuple[Seq[str], Seq[str]]:
    """The tokens of a row, and their tags; of a row with entities, IOB2 on the words of its text."""
    if "tokens" in row:
        tokens = row["tokens"]
        tags = row.get("tags", ()) if with_tags else ()
        if with_tags and len(tags) != len(tokens):
            raise DataError(f"{place_of(row)}: {len(tokens)} tokens have {len(tags)} tags")
        return tokens, tags
    offsets = word_offsets(row["text"])
    words = [row["text"][start:end] for start, end in offsets]
    return words, (_tags_of_entities(offsets, row.get("entities", ())) if with_tags else ())


def _tags_of_entities(offsets: Seq[tuple[int, int]], entities: Seq[JsonObject]) -> list[str]:
    """Tags of words; one that is only partly in an entity is in it."""
    tags = ["O"] * len(offsets)
    for entity in entities:
        inside = [
            i for i, (start, end) in enumerate(offsets) if start < entity["end"] and end > entity["start"]
        ]
        for number, index in enumerate(inside):
            tags[index] = f"{'I' if number else 'B'}-{entity['label']}"
    return tags
