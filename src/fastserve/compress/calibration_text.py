"""Calibration text: sequences of tokens that steps run a model on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.data.read import read_rows
from fastserve.data.row import texts_of
from fastserve.errors import DataError
from fastserve.models.config import DecoderConfig
from fastserve.models.family import read_config
from fastserve.option import check_integer

_POOL = 16  # text is read until there are so many times the sequences that are drawn from it


def calibration_tokens(
    checkpoint: Checkpoint, file: Path | None, *, num_sequences: int, length: int, seed: int
) -> list[list[int]]:
    """Token ids of sequences from a file of text, or of labelled rows of any task, in any format that
    `fastserve.data` reads.

    Of a decoder, `num_sequences` windows of `length` tokens, drawn from the rows end to end, each behind the
    tokens that the tokenizer begins a text with. Of an encoder, so many rows, those beyond `length` cut, with
    special tokens. No more than the model's context is taken of either.

    >>> calibration_tokens(checkpoint, file, num_sequences=64, length=256, seed=0)  # doctest: +SKIP

    Raises:
        DataError: there is no file, or too little in it.
        OptionError: a number is out of its range.
    """
    check_integer("num_sequences", num_sequences, low=1)
    check_integer("length", length, low=8)
    if file is None:
        raise DataError("there is no calibration text", hint="name a file of text with --calibration")
    config = read_config(checkpoint.config)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    length = min(length, config.max_context)
    is_decoder = isinstance(config, DecoderConfig)
    cut = _windows if is_decoder else _rows
    pool: list[list[int]] = []
    for sequence in cut(tokenizer, _texts(file), length):
        pool.append(sequence)
        if len(pool) == _POOL * num_sequences:
            break
    if len(pool) < num_sequences:
        unit = f"{length} tokens" if is_decoder else "a text"
        raise DataError(
            f"{file} has too little text to calibrate with: it comes to {len(pool)} sequences of {unit},"
            f" and {num_sequences} are needed",
            hint="name a longer text, or ask for fewer or shorter sequences",
        )
    chosen = np.random.default_rng(seed).choice(len(pool), num_sequences, replace=False)
    return [pool[index] for index in sorted(chosen)]


def _texts(file: Path) -> Iterator[str]:
    for row in read_rows(file):
        yield from (text for text in texts_of(row) if text.strip())


def _windows(tokenizer: Tokenizer, texts: Iterator[str], length: int) -> Iterator[list[int]]:
    beginning = tokenizer.encode("")
    room = length - len(beginning)
    pending: list[int] = []
    for text in texts:
        pending += tokenizer.encode(f"{text}\n", add_special_tokens=False)
        while len(pending) >= room:
            yield beginning + pending[:room]
            pending = pending[room:]


def _rows(tokenizer: Tokenizer, texts: Iterator[str], length: int) -> Iterator[list[int]]:
    for text in texts:
        ids = tokenizer.encode(text)
        yield ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]
