"""Reads the models of SentencePiece (`tokenizer.model`, `spiece.model`), which are protobuf messages.

Source: sentencepiece_model.proto of google/sentencepiece, and the encoding of protobuf messages
(https://protobuf.dev/programming-guides/encoding). Every length is checked before it is used.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.charsmap import check_charsmap
from fastserve.checkpoint.file import read_bytes
from fastserve.errors import CheckpointError, UnsupportedError

MAX_PIECES = 2**19  # the largest vocabularies have some 260,000

# enum SentencePiece.Type, which GGUF files use too.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_MAX_VARINT_BYTES = 10
_MODEL_TYPES: dict[int, Literal["unigram", "bpe"]] = {1: "unigram", 2: "bpe"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePieceModel:
    """What a tokenizer is built from. `scores` [pieces] f32 and `types` [pieces] int32 go with `pieces`."""

    kind: Literal["unigram", "bpe"]
    pieces: Sequence[str]
    scores: NDArray[np.float32]
    types: NDArray[np.int32]
    unknown_id: int
    charsmap: bytes = b""  # compiled rules of normalization
    adds_prefix: bool = True  # a space before the text
    prefixes_parts: bool = True  # and before what is behind a special token; else only where there is none
    trims_spaces: bool = True  # those around the text go, and of several in a row one stays


@dataclass(slots=True)
class _Piece:
    text: str = ""
    score: float = 0.0
    type: int = NORMAL


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """The model in a file.

    >>> read_sentencepiece(Path("models/llama/tokenizer.model")).kind  # doctest: +SKIP
    'bpe'

    Raises:
        CheckpointError: the file is missing, corrupt or inconsistent.
        UnsupportedError: a kind of model, or a way to write spaces, that we do not have.
    """
    data = read_bytes(path)
    try:
        return _read_model(data, path)
    except (ValueError, IndexError, struct.error) as error:
        raise CheckpointError(
            f"{path} holds no valid SentencePiece model: {error}", hint="download the model again"
        ) from error


def _read_model(data: bytes, path: Path) -> SentencePieceModel:
    stored: list[bytes] = []
    trainer, normalizer = b"", b""
    for number, value in _fields(data):
        if number == 1:
            if len(stored) == MAX_PIECES:  # before any of them is read, which takes longer
                raise ValueError(f"it has more than {MAX_PIECES} pieces")
            stored.append(_as_bytes(value))
        elif number == 2:
            trainer = _as_bytes(value)
        elif number == 3:
            normalizer = _as_bytes(value)
    pieces = list(map(_read_piece, stored))
    if not pieces:
        raise ValueError("it has no pieces")
    if len({piece.text for piece in pieces}) != len(pieces):
        text = next(text for text, count in Counter(piece.text for piece in pieces).items() if count > 1)
        raise ValueError(f"it has two pieces {text!r}")
    numbers = {number: value for number, value in _fields(trainer) if isinstance(value, int)}
    rules = dict(_fields(normalizer))
    kind = _MODEL_TYPES.get(numbers.get(3, 1))
    if kind is None:
        raise UnsupportedError(
            f"{path} is a SentencePiece model of type {numbers.get(3)}, supported are 1 (Unigram) and 2 (BPE)"
        )
    if numbers.get(24, 0):
        raise UnsupportedError(f"{path} writes spaces behind words (treat_whitespace_as_suffix)")
    if not rules.get(5, 1):
        raise UnsupportedError(f"{path} leaves spaces as they are (escape_whitespaces is off)")
    model = SentencePieceModel(
        kind=kind,
        pieces=[piece.text for piece in pieces],
        scores=np.array([piece.score for piece in pieces], np.float32),
        types=np.array([piece.type for piece in pieces], np.int32),
        unknown_id=_find_unknown(pieces),
        charsmap=_as_bytes(rules.get(2, b"")),
        adds_prefix=bool(rules.get(3, 1)),
        trims_spaces=bool(rules.get(4, 1)),
    )
    check_charsmap(model.charsmap)
    return model


def _find_unknown(pieces: Sequence[_Piece]) -> int:
    found = [index for index, piece in enumerate(pieces) if piece.type == UNKNOWN]
    if len(found) != 1:
        raise ValueError(f"it has {len(found)} pieces for what is unknown, not one")
    return found[0]


def _read_piece(data: bytes) -> _Piece:
    piece = _Piece()
    for number, value in _fields(data):
        if number == 1:
            piece.text = _as_bytes(value).decode("utf-8")
        elif number == 2:
            (piece.score,) = struct.unpack("<f", _as_bytes(value))
        elif number == 3:
            if not isinstance(value, int) or not NORMAL <= value <= BYTE:
                raise ValueError(f"a piece is of type {value!r}")
            piece.type = value
    if not piece.text:
        raise ValueError("a piece has no text")
    if not np.isfinite(piece.score):
        raise ValueError(f"the score of {piece.text!r} is {piece.score}")
    return piece


def _as_bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError(f"the number {value} is where bytes should be")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message by number: varints as numbers, everything else as its bytes."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT:
            value, at = _read_varint(data, at)
            yield number, value
            continue
        if wire_type == _BYTES:
            size, at = _read_varint(data, at)
        elif wire_type in (_FIXED32, _FIXED64):
            size = 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError(f"field {number} has wire type {wire_type}")
        if size > len(data) - at:
            raise ValueError(f"field {number} has {size} bytes, {len(data) - at} are left")
        yield number, data[at : at + size]
        at += size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    byte = data[at]
    if byte < 0x80:  # nearly all of them
        return byte, at + 1
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        byte = data[at + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    raise ValueError(f"the number at byte {at} has no end")
