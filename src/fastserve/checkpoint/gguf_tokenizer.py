"""Builds a tokenizer of the `tokenizers` library from the metadata of a GGUF file.

The kinds and their rules are those of llama.cpp (src/llama-vocab.cpp): a file means the same here as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from fastserve.checkpoint.gguf import GgufMetadata
from fastserve.checkpoint.tokenizer_library import add_ends, name_errors
from fastserve.errors import CheckpointError, UnsupportedError

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # enum llama_token_type of llama.h
_SPACE = "▁"

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

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Splitting:
    """How a text is cut into words before byte pairs are merged: by each pattern in turn, gaps kept."""

    patterns: tuple[str, ...]
    is_nfc: bool = False  # characters are composed first
    ignores_merges: bool = False  # a word that is a token is not merged together
    adds_bos: bool = False  # unless the metadata says otherwise


_SMOLLM = _Splitting((r"\p{N}", _GPT2))
_QWEN2 = _Splitting((_GPT4.format(digits=""),), is_nfc=True)
_LLAMA3 = _Splitting((_GPT4.format(digits="{1,3}"),), ignores_merges=True, adds_bos=True)
SPLITTINGS = {
    "gpt-2": _Splitting((_GPT2,)),
    "phi-2": _Splitting((_GPT2,)),
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}


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
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splitting.patterns]
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=metadata.flag("tokenizer.ggml.add_space_prefix") or False, use_regex=False
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(metadata, tokenizer, tokens)
    _add_ends(metadata, tokenizer, tokens, adds_bos=splitting.adds_bos)
    return tokenizer


def _build_sentence_piece(metadata: GgufMetadata, tokens: list[str]) -> Tokenizer:
    """SentencePiece's byte-pair model: the pair that makes the token of the highest score is merged first."""
    scores = metadata.array("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise CheckpointError(f"{metadata.path} lacks a score for each of its {len(tokens)} tokens")
    types = _types(metadata, tokens)
    vocabulary = _vocabulary(tokens)
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges_of_scores(vocabulary, scores, types),
        unk_token=_special_token(metadata, tokens, "unknown") or tokens[0],
        fuse_unk=True,
        byte_fallback=_BYTE in types,
    )
    tokenizer = Tokenizer(model)
    has_prefix = metadata.flag("tokenizer.ggml.add_space_prefix") is not False
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(_SPACE)] if has_prefix else []), normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if has_prefix else []),
        ]
    )
    _add_tokens(metadata, tokenizer, tokens)
    _add_ends(metadata, tokenizer, tokens, adds_bos=True)
    return tokenizer


def _build_word_piece(metadata: GgufMetadata, tokens: list[str]) -> Tokenizer:
    """BERT's, lower-casing as llama.cpp does for all of them: the format does not say."""
    types = _types(metadata, tokens)
    spelled = [_spell_word_piece(token, type_) for token, type_ in zip(tokens, types, strict=True)]
    unknown = _special_token(metadata, tokens, "unknown") or "[UNK]"
    tokenizer = Tokenizer(models.WordPiece(vocab=_vocabulary(spelled), unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    _add_tokens(metadata, tokenizer, spelled)
    first = _special_token(metadata, tokens, "cls") or _special_token(metadata, tokens, "bos")
    last = _special_token(metadata, tokens, "seperator") or _special_token(metadata, tokens, "eos")
    add_ends(tokenizer, first, last)
    return tokenizer


_BUILDERS = {"gpt2": _build_byte_pair, "llama": _build_sentence_piece, "bert": _build_word_piece}


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    return {token: id_ for id_, token in enumerate(tokens)}


def _types(metadata: GgufMetadata, tokens: Sequence[str]) -> NDArray[np.int32]:
    """Type of every token; where the file has none, all are text except those with a role."""
    types = metadata.array("tokenizer.ggml.token_type")
    if types is None:
        types = np.ones(len(tokens), np.int32)
        roles = (metadata.integer(f"tokenizer.ggml.{key}_token_id") for key in ROLES.values())
        types[[id_ for id_ in roles if id_ is not None and 0 <= id_ < len(tokens)]] = _CONTROL
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


def _merges_of_scores(
    vocabulary: dict[str, int], scores: NDArray[np.float32], types: NDArray[np.int32]
) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, best score first; equal ones in the order of the vocabulary.

    Source: generate_merges of transformers, convert_slow_tokenizer.py.
    """
    ranked = []
    for token, id_ in vocabulary.items():
        if types[id_] in (_UNKNOWN, _CONTROL, _BYTE):
            continue
        for middle in range(1, len(token)):
            left, right = vocabulary.get(token[:middle]), vocabulary.get(token[middle:])
            if left is not None and right is not None:
                ranked.append((-scores[id_], id_, left, right, middle, token))
    return [(token[:middle], token[middle:]) for *_, middle, token in sorted(ranked)]


def _spell_word_piece(token: str, type_: int) -> str:
    """GGUF marks the start of a word (`▁the`), the library its continuation (`##ing`)."""
    if type_ == _CONTROL or (token.startswith("[") and token.endswith("]")):
        return token
    return token[len(_SPACE) :] if token.startswith(_SPACE) else f"##{token}"


def _add_tokens(metadata: GgufMetadata, tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
    """Control tokens are no text; user-defined ones are text that is never split."""
    types = _types(metadata, tokens)
    added = [
        AddedToken(tokens[id_], normalized=False, special=bool(types[id_] != _USER_DEFINED))
        for id_ in np.flatnonzero(np.isin(types, (_UNKNOWN, _CONTROL, _USER_DEFINED))).tolist()
    ]
    tokenizer.add_tokens(added)


def _add_ends(metadata: GgufMetadata, tokenizer: Tokenizer, tokens: Sequence[str], *, adds_bos: bool) -> None:
    flag = metadata.flag("tokenizer.ggml.add_bos_token")
    first = _special_token(metadata, tokens, "bos") if (adds_bos if flag is None else flag) else None
    has_last = metadata.flag("tokenizer.ggml.add_eos_token")
    add_ends(tokenizer, first, _special_token(metadata, tokens, "eos") if has_last else None)
