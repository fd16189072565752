"""Writes the tokenizer of a Hugging Face folder as metadata of GGUF.

What `gguf_tokenizer` makes of them is compared with the tokenizer itself on a text that shows how words are
cut: the metadata are those with which it agrees, or there are none.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.folder_tokenizer import build_from_folder
from fastserve.checkpoint.gguf import GgufMetadata, GgufValue, StringArray
from fastserve.checkpoint.gguf_tokenizer import ROLES, SPLITTINGS, build_from_gguf
from fastserve.checkpoint.gguf_writer import WrittenValue
from fastserve.errors import FastServeError, UnsupportedError
from fastserve.types import JsonObject

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = (
    1,
    2,
    3,
    4,
    5,
    6,
)  # enum llama_token_type of llama.h
_SPACE = "▁"
_PREFIX = "tokenizer.ggml."

# Digits, signs, cases, accents, spaces and breaks of many kinds, and scripts with and without spaces.
_PROBE = (
    "Hello, World! It's 3.14159 or 1,234,567;  we'LL see\n\n\n \tthe naïve café_№42 "
    "don't I'M ... --==-- <tag/> {x: [1, 2]} "
    "你好，世界。 こんにちは Здравствуй мир 안녕 हैलो 🙂🚀 e\u0301 ﬁ ½\r\n  \n end "
)


def export_tokenizer(checkpoint: Checkpoint) -> dict[str, WrittenValue]:
    """The tokenizer's metadata, its special tokens and its chat template.

    Raises:
        UnsupportedError: there are no metadata with which a text gives the same tokens.
    """
    backend, roles = build_from_folder(checkpoint.path)
    backend.no_truncation()
    backend.no_padding()
    document = json.loads(backend.to_str())
    kind = document["model"].get("type")
    if kind not in _EXPORTERS:
        raise _unsupported(checkpoint.path, f"of the kind {kind}")
    rows = checkpoint.config["vocab_size"]
    settings = _special_tokens(checkpoint, backend, roles)
    expected = backend.encode(_PROBE).ids
    for candidate in _EXPORTERS[kind](document, max(rows, backend.get_vocab_size(with_added_tokens=True))):
        metadata = {**candidate, **settings}
        if _encode(checkpoint.path, metadata) == expected:
            return metadata
    raise _unsupported(checkpoint.path, "whose words are cut in another way")


def _encode(path: Path, metadata: Mapping[str, WrittenValue]) -> list[int] | None:
    """The tokens of the probe, as the metadata are read; None where they cannot be."""
    values: dict[str, GgufValue] = {
        key: _string_array(path, value) if isinstance(value, list) else value  # type: ignore[misc]
        for key, value in metadata.items()
    }
    try:
        ids: list[int] = build_from_gguf(GgufMetadata(path, values))[0].encode(_PROBE).ids
    except FastServeError:
        return None
    return ids


def _string_array(path: Path, texts: Sequence[str]) -> StringArray:
    """As it is in a file."""
    buffer, offsets = bytearray(), [0]
    for text in texts:
        data = text.encode()
        buffer += struct.pack("<Q", len(data)) + data
        offsets.append(len(buffer))
    return StringArray(path, memoryview(bytes(buffer)), offsets)


def _special_tokens(
    checkpoint: Checkpoint, backend: Tokenizer, roles: Mapping[str, str]
) -> dict[str, WrittenValue]:
    settings: dict[str, WrittenValue] = {}
    for role, text in roles.items():
        id_ = backend.token_to_id(text)
        if id_ is not None:
            settings[f"{_PREFIX}{ROLES[role]}_token_id"] = id_
    eos = settings.get(f"{_PREFIX}eos_token_id")
    size = backend.get_vocab_size(with_added_tokens=True)
    others = [id_ for id_ in checkpoint.eos_token_ids if id_ != eos and id_ < size]
    keys = (["eos"] if eos is None else []) + ["eot", "eom"]
    settings |= {f"{_PREFIX}{key}_token_id": id_ for key, id_ in zip(keys, others, strict=False)}
    plain, whole = (backend.encode("a", add_special_tokens=adds).ids for adds in (False, True))
    settings[f"{_PREFIX}add_bos_token"] = whole[: len(whole) - len(plain)] != [] and whole[0] != plain[0]
    settings[f"{_PREFIX}add_eos_token"] = len(whole) > len(plain) and whole[-1] != plain[-1]
    if checkpoint.chat_template is not None:
        settings["tokenizer.chat_template"] = checkpoint.chat_template
    return settings


def _tokens(document: JsonObject, size: int, spell: Callable[[str], str]) -> dict[str, WrittenValue]:
    """Texts and types by id; ids without a token are unused ones."""
    texts = [f"[PAD{index}]" for index in range(size)]
    types = np.full(size, _UNUSED, np.int32)
    for text, id_ in document["model"]["vocab"].items():
        texts[id_], types[id_] = spell(text), _NORMAL
    for token in document["added_tokens"]:
        texts[token["id"]] = token["content"]
        types[token["id"]] = _CONTROL if token["special"] else _USER_DEFINED
    return {f"{_PREFIX}tokens": texts, f"{_PREFIX}token_type": types}


def _export_byte_pair(document: JsonObject, size: int) -> Iterator[dict[str, WrittenValue]]:
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in document["model"]["merges"]]
    tokens = _tokens(document, size, str)
    if document["model"].get("byte_fallback"):
        yield from _export_sentence_piece(document, tokens, merges)
        return
    for name in SPLITTINGS:
        for has_prefix in (False, True):
            kind: dict[str, WrittenValue] = {
                f"{_PREFIX}model": "gpt2",
                f"{_PREFIX}pre": name,
                f"{_PREFIX}add_space_prefix": has_prefix,
            }
            yield {**kind, **tokens, f"{_PREFIX}merges": merges}


def _export_sentence_piece(
    document: JsonObject, tokens: dict[str, WrittenValue], merges: Sequence[str]
) -> Iterator[dict[str, WrittenValue]]:
    """Scores that bring the merges back in their order: less for a token that is made later."""
    texts, types = tokens[f"{_PREFIX}tokens"], tokens[f"{_PREFIX}token_type"]
    assert isinstance(texts, list)
    assert isinstance(types, np.ndarray)
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        middle = merge.find(" ", 1)
        first.setdefault(merge[:middle] + merge[middle + 1 :], rank)
    scores = np.asarray([-float(first.get(text, 0)) for text in texts], np.float32)
    unknown = document["model"].get("unk_token")
    for id_, text in enumerate(texts):
        if text == unknown:
            types[id_] = _UNKNOWN
    _mark_bytes(tokens)
    for has_prefix in (True, False):
        kind: dict[str, WrittenValue] = {
            f"{_PREFIX}model": "llama",
            f"{_PREFIX}pre": "default",
            f"{_PREFIX}add_space_prefix": has_prefix,
        }
        yield {**kind, **tokens, f"{_PREFIX}scores": scores}


def _mark_bytes(tokens: dict[str, WrittenValue]) -> None:
    texts, types = tokens[f"{_PREFIX}tokens"], tokens[f"{_PREFIX}token_type"]
    assert isinstance(texts, list)
    assert isinstance(types, np.ndarray)
    for id_, text in enumerate(texts):
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[id_] = _BYTE


def _export_word_piece(document: JsonObject, size: int) -> Iterator[dict[str, WrittenValue]]:
    """GGUF marks the start of a word (`▁the`), the library its continuation (`##ing`)."""
    special = {token["content"] for token in document["added_tokens"]}

    def spell(text: str) -> str:
        if text in special or (text.startswith("[") and text.endswith("]")):
            return text
        return text.removeprefix("##") if text.startswith("##") else _SPACE + text

    yield {f"{_PREFIX}model": "bert", f"{_PREFIX}pre": "default", **_tokens(document, size, spell)}


def _export_unigram(document: JsonObject, size: int) -> Iterator[dict[str, WrittenValue]]:
    """Pieces with their scores, and SentencePiece's rules of normalization where there are any."""
    vocabulary = document["model"]["vocab"]
    pieces = {"model": {"vocab": {piece: id_ for id_, (piece, _) in enumerate(vocabulary)}}}
    tokens = _tokens({**document, **pieces}, size, str)
    types = tokens[f"{_PREFIX}token_type"]
    assert isinstance(types, np.ndarray)
    scores = np.zeros(size, np.float32)
    scores[: len(vocabulary)] = [score for _, score in vocabulary]
    kind: dict[str, WrittenValue] = {f"{_PREFIX}model": "t5", f"{_PREFIX}pre": "default"}
    if (unknown := document["model"].get("unk_id")) is not None:
        types[unknown] = _UNKNOWN
        kind[f"{_PREFIX}unknown_token_id"] = unknown
    _mark_bytes(tokens)
    if (charsmap := _find_charsmap(document.get("normalizer"))) is not None:
        kind[f"{_PREFIX}precompiled_charsmap"] = np.frombuffer(charsmap, np.uint8)
    for has_prefix, trims in product((True, False), (True, False)):
        yield {
            **kind,
            **tokens,
            f"{_PREFIX}scores": scores,
            f"{_PREFIX}add_space_prefix": has_prefix,
            f"{_PREFIX}remove_extra_whitespaces": trims,
        }


def _find_charsmap(normalizer: JsonObject | None) -> bytes | None:
    """The rules of the first normalizer, in a sequence or alone, that has compiled ones."""
    if normalizer is None:
        return None
    for step in (normalizer, *normalizer.get("normalizers", ())):
        if step.get("type") == "Precompiled":
            return base64.b64decode(step["precompiled_charsmap"])
    return None


_EXPORTERS: Mapping[str, Callable[[JsonObject, int], Iterator[dict[str, Any]]]] = {
    "BPE": _export_byte_pair,
    "WordPiece": _export_word_piece,
    "Unigram": _export_unigram,
}


def _unsupported(path: Path, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{path} has a tokenizer {what}, which cannot be said in GGUF",
        hint="use --to safetensors or --to compressed-tensors",
    )
