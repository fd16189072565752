"""Builds a tokenizer of the `tokenizers` library from a SentencePiece model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from fastserve.checkpoint.sentencepiece import BYTE, CONTROL, UNKNOWN, USER_DEFINED, SentencePieceModel
from fastserve.errors import CheckpointError

SPACE = "▁"

# A text's merges are looked for at every character of every piece: beyond these no vocabulary goes.
_MAX_PIECE_CHARACTERS = 1024
_MAX_CHARACTERS = 2**23  # the largest vocabularies have some 2 million


def build_from_sentencepiece(
    model: SentencePieceModel, *, first_steps: Sequence[normalizers.Normalizer] = ()
) -> Tokenizer:
    """The tokenizer that splits texts as the `sentencepiece` library does; `first_steps` change a text before
    the model's own rules do. Its `piece_tokens` are still to be added.

    Raises:
        CheckpointError: it is larger than any vocabulary is.
    """
    _check_size(model)
    tokenizer = Tokenizer(_build_bpe(model) if model.kind == "bpe" else _build_unigram(model))
    tokenizer.normalizer = normalizers.Sequence([*first_steps, *_normalization(model)])
    # Words can be looked up alone where no piece goes across them: the library remembers what it found.
    splits = model.kind == "unigram" and not any(SPACE in piece[1:] for piece in model.pieces)
    if model.adds_prefix and not model.prefixes_parts:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "first", splits)
    elif splits:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            *([decoders.ByteFallback()] if BYTE in model.types else []),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if model.adds_prefix else []),
        ]
    )
    return tokenizer


def piece_tokens(pieces: Sequence[str], types: NDArray[np.int32]) -> list[AddedToken]:
    """Pieces that are found in a text before it is split: control pieces are no text, user-defined ones are
    text that is never split.
    """
    return [
        AddedToken(pieces[id_], normalized=False, special=bool(types[id_] != USER_DEFINED))
        for id_ in np.flatnonzero(np.isin(types, (UNKNOWN, CONTROL, USER_DEFINED))).tolist()
    ]


def _check_size(model: SentencePieceModel) -> None:
    longest, total = max(map(len, model.pieces)), sum(map(len, model.pieces))
    if longest > _MAX_PIECE_CHARACTERS or total > _MAX_CHARACTERS:
        raise CheckpointError(
            f"the tokenizer's longest piece has {longest} characters, all have {total}:"
            f" the limits are {_MAX_PIECE_CHARACTERS} and {_MAX_CHARACTERS}"
        )


def _build_bpe(model: SentencePieceModel) -> models.BPE:
    """The pair that makes the piece of the highest score is merged first."""
    vocabulary = {piece: id_ for id_, piece in enumerate(model.pieces)}
    return models.BPE(
        vocab=vocabulary,
        merges=_merges_of_scores(vocabulary, model.scores, model.types),
        unk_token=model.pieces[model.unknown_id],
        fuse_unk=True,
        byte_fallback=BYTE in model.types,
    )


def _build_unigram(model: SentencePieceModel) -> models.Unigram:
    """Of all ways to split a text, the one whose scores have the largest sum."""
    return models.Unigram(
        list(zip(model.pieces, model.scores.tolist(), strict=True)),
        unk_id=model.unknown_id,
        byte_fallback=BYTE in model.types,
    )


def _normalization(model: SentencePieceModel) -> list[normalizers.Normalizer]:
    """The steps of Normalizer::Normalize of google/sentencepiece, src/normalizer.cc.

    `Precompiled` follows the rules character by character within what is written as one: unlike there, vowel
    signs of several parts (Bengali, Tamil) stay in parts. So do the tokenizers of transformers.
    """
    return [
        *([normalizers.Precompiled(model.charsmap)] if model.charsmap else []),
        *(
            [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
            if model.trims_spaces
            else []
        ),
        *([normalizers.Prepend(SPACE)] if model.adds_prefix and model.prefixes_parts else []),
        normalizers.Replace(" ", SPACE),
    ]


def _merges_of_scores(
    vocabulary: dict[str, int], scores: NDArray[np.float32], types: NDArray[np.int32]
) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, best score first; equal ones in the order of the vocabulary.

    Source: generate_merges of transformers, convert_slow_tokenizer.py.
    """
    is_merged = ~np.isin(types, (UNKNOWN, CONTROL, BYTE))
    ranked = []
    for token, id_ in vocabulary.items():
        if not is_merged[id_]:
            continue
        for middle in range(1, len(token)):
            left, right = vocabulary.get(token[:middle]), vocabulary.get(token[middle:])
            if left is not None and right is not None:
                ranked.append((-scores[id_], id_, left, right, middle, token))
    return [(token[:middle], token[middle:]) for *_, middle, token in sorted(ranked)]
