"""Rows as numbers: the token ids of their texts, with ids of labels, tags and answers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve.data.row import Row, labels_of
from fastserve.data.vocabulary import Vocabulary
from fastserve.errors import DataError
from fastserve.option import check_choice, check_integer

if TYPE_CHECKING:
    import tokenizers

IGNORED = -100  # the label of tokens that teach nothing, as torch's cross entropy has it
_ON_LONG = ("error", "truncate", "drop")


def open_tokenizer(path: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """The tokenizer of a model directory, a folder with a tokenizer.json, or a GGUF file.

    Raises:
        DataError: nothing is there.
        CheckpointError, UnsupportedError: there is no tokenizer, or it is of a kind that we do not have.
    """
    return _build(Path(path))[0]


def find_eos_id(path: str | os.PathLike[str]) -> int | None:
    """The token that ends texts, as the files of `open_tokenizer` name it. Raises as that does."""
    backend, roles = _build(Path(path))
    name = roles.get("eos_token")
    return None if name is None else backend.token_to_id(name)


def _build(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer and its special tokens by role."""
    if not folder.exists():
        raise DataError(f"no model is at {folder}", hint="give its folder, or its .gguf file")
    backend: tokenizers.Tokenizer
    if folder.is_dir() and not list(folder.glob("*.gguf")):
        from fastserve.checkpoint.folder_tokenizer import build_from_folder

        backend, roles = build_from_folder(folder)
    else:
        from fastserve.checkpoint.gguf import read_gguf
        from fastserve.checkpoint.gguf_tokenizer import build_from_gguf

        file = folder if folder.is_file() else min(folder.glob("*.gguf"))
        backend, roles = build_from_gguf(read_gguf(file).metadata)
    backend.no_truncation()
    backend.no_padding()
    return backend, roles


def label_names(rows: Iterable[Mapping[str, Any]]) -> list[str | int | float]:
    """Every label of rows, sorted; of rows with tags, every tag, `O` first."""
    names: set[str | int | float] = set()
    has_tags = False
    for row in rows:
        has_tags = has_tags or "tags" in row
        names.update(row["tags"] if "tags" in row else labels_of(row))
    if has_tags:
        return ["O", *sorted(str(name) for name in names - {"O"})]
    return sorted(names, key=lambda name: (isinstance(name, str), name))


def encode_data(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: tokenizers.Tokenizer | Vocabulary,
    *,
    labels: Sequence[str | int | float] | None = None,
    max_length: int | None = None,
    on_long: str = "error",
) -> list[dict[str, Any]]:
    """Encode rows of any task but dialogue, whose template is the model's.

    Each becomes {"input_ids"}, with what its fields call for: "type_ids" of a pair; "label", an index into
    `labels`, or several as "labels" (a float stays as it is); "labels" of tags, one for each token: that of a
    word at its first token, -100 elsewhere (a word that the tokenizer has no token for has none); "start" and
    "end" of the first answer, the tokens of its first and last character, or 0 where there is none; "labels"
    of a target; "choices", each with "input_ids".

    Args:
        rows: of one task, as `load_data` gives them.
        tokenizer: of `open_tokenizer` or `train_tokenizer`, or a vocabulary.
        labels: names by index; None takes those of the rows, sorted: `label_names(rows)`.
        max_length: the most tokens.
        on_long: what becomes of a row beyond: `error`, `truncate`, or `drop`. A tokenizer's special tokens
            stay when a text is cut; of a pair the longer text is.

    >>> from fastserve.data.vocabulary import create_vocab
    >>> rows = [{"text": "good film", "label": "pos"}]
    >>> encode_data(rows, create_vocab(rows))
    [{'input_ids': [5, 4], 'label': 0}]

    Raises:
        DataError: a label is none of `labels`, a row is too long, an answer lies in what is cut off.
        OptionError: an option is out of range.
    """
    if max_length is not None:
        check_integer("max_length", max_length, low=1)
    check_choice("on_long", on_long, _ON_LONG)
    names = list(label_names(rows) if labels is None else labels)
    if max_length is not None and on_long == "truncate":
        tokenizer = _cutting(tokenizer, max_length)
    encoder = _RowEncoder(tokenizer, {name: index for index, name in enumerate(names)})
    encoded = []
    for number, fields in enumerate(rows, start=1):
        row = fields if isinstance(fields, Row) else Row(fields, line=number)
        example = encoder.encode(row)
        length = max(map(len, _id_lists(example, row)))
        if max_length is not None and length > max_length:
            if on_long == "drop":
                continue
            raise DataError(
                f"{row.place}: {length} tokens; the limit is {max_length}",
                hint="raise max_length, or choose on_long='truncate' or 'drop'",
            )
        encoded.append(example)
    return encoded


class _RowEncoder:
    def __init__(
        self, tokenizer: tokenizers.Tokenizer | Vocabulary, ids: Mapping[str | int | float, int]
    ) -> None:
        self._tokenizer = tokenizer
        self._ids = ids

    def encode(self, row: Row) -> dict[str, Any]:
        if "messages" in row:
            raise DataError(
                f"{row.place}: messages are encoded by a model's chat template", hint="give them to tune"
            )
        if "choices" in row:
            stem = row.get("question") or row["context"]
            return {"choices": [self._pair(stem, choice) for choice in row["choices"]], "label": row["label"]}
        if "tokens" in row:
            return self._tokens(row) | self._label(row)
        if "answers" in row:
            return self._answer(row)
        if "source" in row:
            return {**self._text(row["source"]), "labels": self._text(row["target"])["input_ids"]}
        if "text_pair" in row:
            return self._pair(row["text"], row["text_pair"]) | self._label(row)
        return self._text(row["text"]) | self._label(row)

    def _label(self, row: Row) -> dict[str, Any]:
        if "labels" in row:
            return {"labels": [self._id(row, label) for label in row["labels"]]}
        return {"label": self._id(row, row["label"])} if "label" in row else {}

    def _id(self, row: Row, label: str | int | float) -> int | float:
        if isinstance(label, float):
            return label
        if label not in self._ids:
            raise DataError(f"{row.place}: label {label!r} is none of {len(self._ids)} known ones")
        return self._ids[label]

    def _text(self, text: str) -> dict[str, Any]:
        if isinstance(self._tokenizer, Vocabulary):
            return {"input_ids": self._tokenizer.encode(text)}
        return {"input_ids": self._tokenizer.encode(text).ids}

    def _pair(self, one: str, other: str) -> dict[str, Any]:
        if isinstance(self._tokenizer, Vocabulary):
            ones, both = self._tokenizer.encode(one), self._tokenizer.encode(f"{one}\n{other}")
            return {"input_ids": both, "type_ids": [0] * len(ones) + [1] * (len(both) - len(ones))}
        encoding = self._tokenizer.encode(one, other)
        return {"input_ids": encoding.ids, "type_ids": encoding.type_ids}

    def _tokens(self, row: Row) -> dict[str, Any]:
        if isinstance(self._tokenizer, Vocabulary):
            example: dict[str, Any] = {"input_ids": self._tokenizer.encode_words(row["tokens"])}
            words: list[int | None] = list(range(len(example["input_ids"])))
        else:
            encoding = self._tokenizer.encode(row["tokens"], is_pretokenized=True)
            example = {"input_ids": encoding.ids}
            words = encoding.word_ids
        if "tags" in row:
            example["labels"] = [
                self._id(row, row["tags"][word])
                if word is not None and (at == 0 or words[at - 1] != word)
                else IGNORED
                for at, word in enumerate(words)
            ]
        return example

    def _answer(self, row: Row) -> dict[str, Any]:
        if isinstance(self._tokenizer, Vocabulary):
            raise DataError(
                f"{row.place}: answers are found among tokens of a tokenizer",
                hint="give one of open_tokenizer or train_tokenizer",
            )
        encoding = self._tokenizer.encode(row["question"], row["context"])
        example = {"input_ids": encoding.ids, "type_ids": encoding.type_ids, "start": 0, "end": 0}
        if row["answers"]["text"]:
            start = row["answers"]["answer_start"][0]
            end = start + len(row["answers"]["text"][0])
            inside = [
                at
                for at, (first, last) in enumerate(encoding.offsets)
                if encoding.sequence_ids[at] == 1 and first < end and last > start
            ]
            if not inside:
                raise DataError(
                    f"{row.place}: the answer is not among the {len(encoding.ids)} tokens",
                    hint="raise max_length, or choose on_long='drop'",
                )
            example |= {"start": inside[0], "end": inside[-1]}
        return example


def _id_lists(example: Mapping[str, Any], row: Row) -> list[list[int]]:
    if "choices" in example:
        return [choice["input_ids"] for choice in example["choices"]]
    return [example["input_ids"], *([example["labels"]] if "target" in row else [])]


def _cutting(
    tokenizer: tokenizers.Tokenizer | Vocabulary, max_length: int
) -> tokenizers.Tokenizer | Vocabulary:
    """The tokenizer, or a copy of it, that cuts what is too long."""
    if isinstance(tokenizer, Vocabulary):
        return _CuttingVocabulary(tokenizer, max_length)
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.enable_truncation(max_length)
    return copy


class _CuttingVocabulary(Vocabulary):
    def __init__(self, vocabulary: Vocabulary, max_length: int) -> None:
        super().__init__(vocabulary.words, segmenter=vocabulary.segmenter)
        self._max_length = max_length

    def encode_words(self, words: Sequence[str]) -> list[int]:
        return super().encode_words(words)[: self._max_length]
