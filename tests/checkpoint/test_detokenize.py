from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models

from fastserve.checkpoint import open_checkpoint
from fastserve.checkpoint.detokenize import DecodingRule
from fastserve.checkpoint.gguf import read_gguf
from fastserve.checkpoint.gguf_tokenizer import build_from_gguf
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.errors import UnsupportedError

FAMILIES = ["gpt-2", "qwen2", "llama-spm", "phi-3", "bert-bge"]


@pytest.fixture(scope="module")
def tokenizers(shared_data: Path) -> Callable[[str], tuple[Tokenizer, LibraryTokenizer]]:
    @cache
    def build(name: str) -> tuple[Tokenizer, LibraryTokenizer]:
        metadata = read_gguf(shared_data / "tokenizer_vectors" / f"ggml-vocab-{name}.gguf").metadata
        library, special_tokens = build_from_gguf(metadata)
        return Tokenizer(library, special_tokens), library

    return build


def ids_of(vocab_size: int) -> st.SearchStrategy[list[int]]:
    """Random tokens, and often those where special tokens, bytes and short pieces are: the first and last."""
    one = st.integers(0, vocab_size - 1) | st.integers(0, min(300, vocab_size - 1))
    return st.lists(one | st.integers(vocab_size - 70, vocab_size + 5), max_size=24)


def stream_pieces(tokenizer: Tokenizer, ids: list[int], *, skip_special_tokens: bool) -> list[str]:
    stream = tokenizer.stream_decoder(skip_special_tokens=skip_special_tokens)
    return [*[stream.push(token_id) for token_id in ids], stream.finish()]


def has_invalid_byte_run(tokenizer: Tokenizer, ids: list[int]) -> bool:
    """Whether byte tokens in a row make no valid UTF-8: there the library replaces the whole run."""
    run = b""
    for token in [*[tokenizer.token_text(id_) or "" for id_ in ids], "end"]:
        if token.startswith("<0x"):
            run += bytes.fromhex(token[3:5])
            continue
        try:
            run.decode()
        except UnicodeDecodeError:
            return True
        run = b""
    return False


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data(), skip_special_tokens=st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_tokens_decode_as_in_the_library_and_stream_to_the_same_text(
    tokenizers: Callable[[str], tuple[Tokenizer, LibraryTokenizer]],
    family: str,
    data: st.DataObject,
    skip_special_tokens: bool,
) -> None:
    ours, library = tokenizers(family)
    ids = data.draw(ids_of(ours.vocab_size))
    text = ours.decode(ids, skip_special_tokens=skip_special_tokens)
    assert "".join(stream_pieces(ours, ids, skip_special_tokens=skip_special_tokens)) == text
    kept = [i for i in ids if not (skip_special_tokens and i in ours.special_ids)]
    if not has_invalid_byte_run(ours, kept):
        assert text == library.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("family", ["gpt-2", "qwen2", "llama-spm", "phi-3"])
@given(text=st.text(max_size=40), cut=st.integers(0, 200))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_half_character_is_emitted_before_the_end(
    tokenizers: Callable[[str], tuple[Tokenizer, LibraryTokenizer]], family: str, text: str, cut: int
) -> None:
    ours, _ = tokenizers(family)
    ids = ours.encode(text)[:cut]
    pieces = stream_pieces(ours, ids, skip_special_tokens=True)
    emitted = "".join(pieces[:-1])
    if "\ufffd" not in text:
        assert "\ufffd" not in emitted
        assert pieces[-1] in ("", "\ufffd")
    assert ours.decode(ours.encode(text), skip_special_tokens=True).startswith(emitted)


@given(data=st.binary(max_size=12))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_invalid_bytes_are_replaced_as_by_the_library_of_byte_level_tokens(
    tokenizers: Callable[[str], tuple[Tokenizer, LibraryTokenizer]], data: bytes
) -> None:
    ours, library = tokenizers("gpt-2")
    bytes_in_order = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # GPT-2's first 188 tokens
    bytes_in_order += [byte for byte in range(256) if byte not in bytes_in_order]
    ids = [bytes_in_order.index(byte) for byte in data]
    assert ours.decode(ids) == data.decode("utf-8", "replace") == library.decode(ids)


def test_an_invalid_run_of_byte_tokens_keeps_its_valid_characters(shared_data: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(shared_data / "model_stories260K"))
    byte = {value: tokenizer.token_id(f"<0x{value:02X}>") for value in (0xE4, 0xBD, 0xA0, 0xE5, 0x41)}
    ids = [byte[value] for value in (0xE4, 0xBD, 0xA0, 0xE5, 0x41, 0xE4, 0xBD)]
    assert all(isinstance(id_, int) for id_ in ids)
    pieces = stream_pieces(tokenizer, [id_ for id_ in ids if id_ is not None], skip_special_tokens=True)
    assert pieces == ["", "", "你", "", "\ufffdA", "", "", "\ufffd"]


def test_the_leading_space_is_dropped_once_wherever_it_arrives(shared_data: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(shared_data / "model_stories260K"))
    space, byte_space = tokenizer.token_id("▁"), tokenizer.token_id("<0x20>")
    assert space is not None
    assert byte_space is not None
    assert stream_pieces(tokenizer, [1, space, space], skip_special_tokens=True) == ["", "", " ", ""]
    assert stream_pieces(tokenizer, [byte_space, space], skip_special_tokens=True) == ["", " ", ""]


VOCABULARY = [
    "▁",
    "▁the",
    "the",
    "▁▁a",
    "##s",
    "s",
    ".",
    "n't",
    "'",
    "<0x41>",
    "é",
    "[SEP]",
    "Ġx",
    "do",
    "not",
]


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.ByteLevel(),
        decoders.WordPiece(),
        decoders.WordPiece(prefix="s", cleanup=False),
        decoders.Metaspace(),
        decoders.Metaspace(prepend_scheme="never"),
        decoders.Fuse(),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
        decoders.Sequence([decoders.ByteLevel()]),
    ],
)
@given(ids=st.lists(st.integers(0, len(VOCABULARY) - 1), max_size=8))
def test_every_supported_decoder_gives_the_text_of_the_library(decoder: Any, ids: list[int]) -> None:
    library = LibraryTokenizer(
        models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="s")
    )
    if decoder is not None:
        library.decoder = decoder
    assert Tokenizer(library, {}).decode(ids) == library.decode(ids)


@pytest.mark.parametrize(
    ("decoder", "name"),
    [
        (decoders.BPEDecoder(), "BPEDecoder"),
        (decoders.CTC(), "CTC"),
        (decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]), "Strip → Fuse"),
        (decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]), "Strip"),
        (decoders.Sequence([decoders.Fuse(), decoders.Strip("x", 1, 0)]), "Strip"),
        (decoders.Sequence([decoders.Fuse(), decoders.ByteFallback()]), "Fuse → ByteFallback"),
        (decoders.Sequence([decoders.ByteLevel(), decoders.WordPiece()]), "ByteLevel → WordPiece"),
    ],
)
def test_a_decoder_that_cannot_stream_exactly_is_refused_by_name(decoder: Any, name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"the tokenizer decodes by {name}, which is not supported"):
        DecodingRule.from_json(json.loads(decoder.__getstate__()))
