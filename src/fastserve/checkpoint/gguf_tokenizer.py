"""Builds a tokenizer of the `tokenizers` library from the metadata of a GGUF file.

The kinds and their rules are those of llama.cpp (src/llama-vocab.cpp): a file means the same here as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from fastserve.checkpoint.charsmap import check_charsmap
from fastserve.checkpoint.gguf import GgufMetadata
from fastserve.checkpoint.sentencepiece import CONTROL, SentencePieceModel
from fastserve.checkpoint.sentencepiece_tokenizer import SPACE, build_from_sentencepiece, piece_tokens
from fastserve.checkpoint.splitting import DIGIT, GPT2, GPT4O, LLAMA3, QWEN2, QWEN35, TEKKEN, cut_words
from fastserve.checkpoint.tokenizer_library import add_ends, name_errors
from fastserve.errors import CheckpointError, UnsupportedError

# Roles as chat templates know them → keys in the metadata ("seperator" is the format's own spelling).
ROLES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "sep_token": "seperator",
    "cls_token": "cls",
    "mask_token": "mask",
}


@dataclass(frozen=True, slots=True)
class _Splitting:
    """How a text is cut into words before byte pairs are merged: by each pattern in turn, gaps kept."""

    patterns: tuple[str, ...]
    is_nfc: bool = False  # characters are composed first
    ignores_merges: bool = False  # a word that is a token is not merged together
    adds_bos: bool = False  # unless the metadata says otherwise


_NAMED_SPLITTINGS: dict[tuple[str, ...], _Splitting] = {
    ("gpt-2", "phi-2", "mpt", "jais", "trillion", "exaone4", "mellum", "roberta-bpe"): _Splitting((GPT2,)),
    ("jina-v1-en", "jina-v2-code", "jina-v2-es", "jina-v2-de"): _Splitting((GPT2,)),
    ("olmo", "modern-bert"): _Splitting((GPT2,), is_nfc=True),  # GPT-NeoX's, which Pythia has too
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"): _Splitting(
        (DIGIT, GPT2)
    ),
    ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"): _Splitting((QWEN2,), is_nfc=True),
    ("qwen35",): _Splitting((QWEN35,), is_nfc=True),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"): _Splitting(
        (LLAMA3,), ignores_merges=True, adds_bos=True
    ),
    ("dbrx", "smaug-bpe", "chatglm-bpe"): _Splitting((LLAMA3,)),
    ("glm4",): _Splitting((LLAMA3,), ignores_merges=True),
    ("gpt-4o", "llama4"): _Splitting((GPT4O,)),
    ("tekken",): _Splitting((TEKKEN,), ignores_merges=True, adds_bos=True),
}
SPLITTINGS = {name: splitting for names, splitting in _NAMED_SPLITTINGS.items() for name in names}


def build_from_gguf(metadata: GgufMetadata) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer that the metadata describes, and its special tokens by role.

    Raises:
        CheckpointError: a part is missing or inconsistent.
        UnsupportedError: a kind of tokenizer, or of splitting into words, that we do not have.
    """
    kind = metadata.text("tokenizer.ggml.model")
    if kind not in _BUILDERS:
        raise UnsupportedError(
            f"{metadata.path} has tokenizer {kind!r}, supported in GGUF are {', '.join(_BUILDERS)}"
        )
    tokens = list(metadata.texts("tokenizer.ggml.tokens") or ())
    if not tokens:
        raise CheckpointError(f"{metadata.path} has a tokenizer without tokens")
    with name_errors(metadata.path):
        backend = _BUILDERS[kind](metadata, tokens)
    found = {role: _special_token(metadata, tokens, key) for role, key in ROLES.items()}
    return backend, {role: text for role, text in found.items() if text is not None}


def _build_byte_pair(metadata: GgufMetadata, tokens: list[str]) -> Tokenizer:
    name = metadata.text("tokenizer.ggml.pre")
    splitting = SPLITTINGS.get(name or "")
    if splitting is None:
        raise UnsupportedError(
            f"{metadata.path} splits words by {name!r} (tokenizer.ggml.pre),"
            f" supported are {', '.join(SPLITTINGS)}"
        )
    vocabulary = _vocabulary(tokens)
    model = models.BPE(
        vocab=vocabulary,
        merges=_read_merges(metadata, vocabulary),
        ignore_merges=splitting.ignores_merges,
    )
    tokenizer = Tokenizer(model)
    if splitting.is_nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = cut_words(splitting.patterns)
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(metadata, tokenizer, tokens)
    _add_ends(metadata, tokenizer, tokens, adds_bos=splitting.adds_bos)
    return tokenizer


def _build_sentence_piece(metadata: GgufMetadata, tokens: list[str]) -> Tokenizer:
    """SentencePiece's byte-pair model, whose rules of normalization the format does not keep."""
    return _build_pieces(metadata, tokens, "bpe")


def _build_unigram(metadata: GgufMetadata, tokens: list[str]) -> Tokenizer:
    """SentencePiece's Unigram model: T5's and XLM-RoBERTa's."""
    return _build_pieces(metadata, tokens, "unigram")


def _build_pieces(metadata: GgufMetadata, tokens: list[str], kind: Literal["bpe", "unigram"]) -> Tokenizer:
    """Unless the metadata says otherwise, byte pairs have a space and a token before the text, Unigram has a
    token behind it.
    """
    is_bpe = kind == "bpe"
    scores = metadata.array("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise CheckpointError(f"{metadata.path} lacks a score for each of its {len(tokens)} tokens")
    if not np.isfinite(scores).all():
        raise CheckpointError(f"{metadata.path} has a score that is no number")
    if metadata.flag("tokenizer.ggml.treat_whitespace_as_suffix"):
        raise UnsupportedError(f"{metadata.path} writes spaces behind words (treat_whitespace_as_suffix)")
    charsmap = metadata.array("tokenizer.ggml.precompiled_charsmap")
    model = SentencePieceModel(
        kind=kind,
        pieces=tokens,
        scores=scores.astype(np.float32),
        types=_types(metadata, tokens),
        unknown_id=_find_unknown(metadata, tokens, kind),
        charsmap=b"" if charsmap is None else charsmap.tobytes(),
        adds_prefix=_flag(metadata, "add_space_prefix", default=is_bpe),
        trims_spaces=_flag(metadata, "remove_extra_whitespaces", default=False),
    )
    check_charsmap(model.charsmap)
    tokenizer = build_from_sentencepiece(model)
    _add_tokens(metadata, tokenizer, tokens)
    _add_ends(metadata, tokenizer, tokens, adds_bos=is_bpe, adds_eos=not is_bpe)
    return tokenizer


def _find_unknown(metadata: GgufMetadata, tokens: list[str], kind: str) -> int:
    token_id = metadata.integer("tokenizer.ggml.unknown_token_id")
    if token_id is None and kind == "unigram":
        raise CheckpointError(f"{metadata.path} names no token for what is unknown (unknown_token_id)")
    if token_id is not None:
        _special_token(metadata, tokens, "unknown")
    return token_id or 0


def _build_word_piece(metadata: GgufMetadata, tokens: list[str]) -> Tokenizer:
    """BERT's, lower-casing unless the metadata says otherwise, which older files never do."""
    types = _types(metadata, tokens)
    spelled = [_spell_word_piece(token, type_) for token, type_ in zip(tokens, types, strict=True)]
    unknown = _special_token(metadata, tokens, "unknown") or "[UNK]"
    tokenizer = Tokenizer(models.WordPiece(vocab=_vocabulary(spelled), unk_token=unknown))
    lowercase = _flag(metadata, "normalizer.lowercase", default=True)
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase,
        strip_accents=_flag(metadata, "normalizer.strip_accents", default=lowercase),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    _add_tokens(metadata, tokenizer, spelled)
    first = _special_token(metadata, tokens, "cls") or _special_token(metadata, tokens, "bos")
    last = _special_token(metadata, tokens, "seperator") or _special_token(metadata, tokens, "eos")
    add_ends(tokenizer, first, last, num_between=1, second_type_id=1)
    return tokenizer


_BUILDERS = {
    "gpt2": _build_byte_pair,
    "llama": _build_sentence_piece,
    "t5": _build_unigram,
    "bert": _build_word_piece,
}


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    return {token: id_ for id_, token in enumerate(tokens)}


def _types(metadata: GgufMetadata, tokens: Sequence[str]) -> NDArray[np.int32]:
    """Type of every token; where the file has none, all are text except those with a role."""
    types = metadata.array("tokenizer.ggml.token_type")
    if types is None:
        types = np.ones(len(tokens), np.int32)
        roles = (metadata.integer(f"tokenizer.ggml.{key}_token_id") for key in ROLES.values())
        types[[id_ for id_ in roles if id_ is not None and 0 <= id_ < len(tokens)]] = CONTROL
    if len(types) != len(tokens):
        raise CheckpointError(f"{metadata.path} has {len(types)} token types for {len(tokens)} tokens")
    return types


def _special_token(metadata: GgufMetadata, tokens: Sequence[str], key: str) -> str | None:
    id_ = metadata.integer(f"tokenizer.ggml.{key}_token_id")
    if id_ is not None and not 0 <= id_ < len(tokens):
        raise CheckpointError(
            f"{metadata.path}: {key}_token_id is {id_}, the vocabulary has {len(tokens)} tokens"
        )
    return None if id_ is None else tokens[id_]


def _read_merges(metadata: GgufMetadata, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """`Ġ t`: the space that separates is not the first character, which may be one itself."""
    merges = []
    for merge in metadata.texts("tokenizer.ggml.merges") or ():
        middle = merge.find(" ", 1)
        left, right = merge[:middle], merge[middle + 1 :]
        if middle < 0 or left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise CheckpointError(
                f"{metadata.path} merges {merge!r}, which are no two tokens that make a third"
            )
        merges.append((left, right))
    return merges


def _spell_word_piece(token: str, type_: int) -> str:
    """GGUF marks the start of a word (`▁the`), the library its continuation (`##ing`)."""
    if type_ == CONTROL or (token.startswith("[") and token.endswith("]")):
        return token
    return token[len(SPACE) :] if token.startswith(SPACE) else f"##{token}"


def _add_tokens(metadata: GgufMetadata, tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
    tokenizer.add_tokens(piece_tokens(tokens, _types(metadata, tokens)))


def _add_ends(
    metadata: GgufMetadata,
    tokenizer: Tokenizer,
    tokens: Sequence[str],
    *,
    adds_bos: bool,
    adds_eos: bool = False,
) -> None:
    has_first = _flag(metadata, "add_bos_token", default=adds_bos)
    has_last = _flag(metadata, "add_eos_token", default=adds_eos)
    first = _special_token(metadata, tokens, "bos") if has_first else None
    add_ends(tokenizer, first, _special_token(metadata, tokens, "eos") if has_last else None)


def _flag(metadata: GgufMetadata, name: str, *, default: bool) -> bool:
    value = metadata.flag(f"tokenizer.ggml.{name}")
    return default if value is None else value
