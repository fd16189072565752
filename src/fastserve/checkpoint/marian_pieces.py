"""The pieces of a Marian tokenizer: those of source.spm, which cut a text, under the ids of vocab.json, which
has those of the target language too, unless target.spm and target_vocab.json have them apart.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from fastserve.checkpoint.file import read_json
from fastserve.checkpoint.sentencepiece import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    SentencePieceModel,
    read_sentencepiece,
)
from fastserve.errors import CheckpointError, UnsupportedError

MARK = "\U000f0000"
"""Behind pieces of the target language alone, so that no source is cut into them: a character of private use,
which is taken out of texts before they are cut, and out of pieces when they become text."""

UNKNOWN_PIECE = "<unk>"
_UNKNOWN_PENALTY = 10.0  # of a character that no piece has, below the least score (google/sentencepiece)
_CODE_START, _CODE_END = ">>", "<<"  # around the name of a target language, before a text


def read_marian_pieces(folder: Path, *, of_target: bool = False) -> tuple[SentencePieceModel, list[str]]:
    """The pieces in the order of their ids, and those that name a target language.

    What source.spm has and vocab.json has not is cut into smaller pieces, and of characters in a row that
    source.spm has not those are found that vocab.json has; `transformers` makes both unknown.

    Args:
        of_target: those of target.spm and target_vocab.json, of a model with two vocabularies.

    Raises:
        CheckpointError: a file is missing or corrupt, or the ids are not those from 0 on.
        UnsupportedError: source.spm is no Unigram model.
    """
    pieces_path = folder / ("target.spm" if of_target else "source.spm")
    model = read_sentencepiece(pieces_path)
    if model.kind != "unigram":
        raise UnsupportedError(f"{pieces_path} is a {model.kind} model, supported is unigram")
    path = folder / ("target_vocab.json" if of_target else "vocab.json")
    vocabulary = read_json(path)
    ids = list(vocabulary.values())
    if not all(type(id_) is int for id_ in ids) or sorted(ids) != list(range(len(ids))):
        raise CheckpointError(f"{path} has other ids than those from 0 to {len(ids) - 1}")
    if UNKNOWN_PIECE not in vocabulary:
        raise CheckpointError(f"{path} lacks {UNKNOWN_PIECE!r}, the token for what is unknown")
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    index_of = {piece: index for index, piece in enumerate(model.pieces)}
    found = [index_of.get(piece) for piece in pieces]
    known = np.array([index is not None for index in found])
    indices = np.array([0 if index is None else index for index in found])
    codes = [piece for piece in pieces if piece.startswith(_CODE_START) and piece.endswith(_CODE_END)]
    unknown_id = int(vocabulary[UNKNOWN_PIECE])
    types = np.where(known, model.types[indices], NORMAL)
    types[types == UNKNOWN] = CONTROL
    types[unknown_id] = UNKNOWN
    is_text = [index is None and not _is_named(piece) for index, piece in zip(found, pieces, strict=True)]
    # A character that no piece of the source has is what the vocabulary has under its name.
    is_letter = np.array([len(piece) == 1 for piece in pieces])
    least = model.scores.min()
    others = np.where(is_letter, least - _UNKNOWN_PENALTY, least)
    whole = replace(
        model,
        pieces=[
            piece + MARK if marked and len(piece) > 1 else piece
            for piece, marked in zip(pieces, is_text, strict=True)
        ],
        scores=np.where(known, model.scores[indices], others).astype(np.float32),
        types=types.astype(np.int32),
        unknown_id=unknown_id,
        prefixes_parts=True,
    )
    return whole, codes


def _is_named(piece: str) -> bool:
    """Whether it is a special token, or names a language."""
    return (piece.startswith("<") and piece.endswith(">")) or (
        piece.startswith(_CODE_START) and piece.endswith(_CODE_END)
    )
