from __future__ import annotations

import base64
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.checkpoint.folder_tokenizer import build_from_folder
from fastserve.checkpoint.gguf import GgufMetadata, StringArray
from fastserve.checkpoint.gguf_tokenizer import build_from_gguf
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.errors import CheckpointError, UnsupportedError

TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3}, "merges": [["a", "b"]]},
}
TEXT = "a" * 60 + "b c"
TEMPLATE = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
SEQUENCE = {"Sequence": {"id": "A", "type_id": 0}}


def write(folder: Path, **changes: Any) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps({**TOKENIZER, **changes}))
    return folder


def replacing(content: str, times: int = 1) -> dict[str, Any]:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": content}
    return {"type": "Sequence", "normalizers": [step] * times}


def precompiled(charsmap: bytes) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"normalizer": replacing("a" * 1000)}, "1000 times longer, the limit is 256"),
        ({"normalizer": replacing("a" * 20, 4)}, "160000 times longer"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 999}}, "999 times longer"),
        ({"decoder": replacing("a" * 999)["normalizers"][0]}, "decoder that makes"),
        ({"post_processor": {**TEMPLATE, "single": [SEQUENCE] * 2}}, "2 of them the text itself"),
        ({"post_processor": {**TEMPLATE, "single": [SEQUENCE] * 10_000}}, "10000 parts"),
        ({"normalizer": precompiled(bytes(8))}, "trie of 0"),
        ({"normalizer": precompiled(b"\4\0\0\0\xff\xff\xff\x7fab\0")}, "lead to unit"),
        ({"normalizer": precompiled(b"\4\0\0\0\xff\xff\xff\xffab\0")}, "at byte 2147483647 of 3"),
        ({"normalizer": precompiled(b"\4\0\0\0\0\0\0\x80" + b"a" * 999 + b"\0")}, "writes 999 bytes"),
    ],
)  # fmt: skip
def test_rules_that_multiply_a_text_or_lead_out_of_their_tables_are_refused(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        build_from_folder(write(tmp_path, **change))


@pytest.mark.parametrize("pattern", ["(a+)+$", "(?:a|a)*c$"])
def test_a_pattern_that_takes_for_ever_is_a_named_error_within_a_second(tmp_path: Path, pattern: str) -> None:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    tokenizer = Tokenizer(*build_from_folder(write(tmp_path, pre_tokenizer=split)))
    start = time.process_time()
    with pytest.raises(CheckpointError, match=r"cannot split this text: .*retry-limit"):
        tokenizer.encode(TEXT)
    assert time.process_time() - start < 2


def test_a_text_that_the_vocabulary_cannot_spell_is_a_named_error(tmp_path: Path) -> None:
    model = {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]]}
    tokenizer = Tokenizer(*build_from_folder(write(tmp_path, model=model)))
    assert tokenizer.encode("aa") == [0, 0]
    with pytest.raises(CheckpointError, match="cannot split this text: Encountered an unknown token"):
        tokenizer.encode("b")


def test_nested_documents_are_refused(tmp_path: Path) -> None:
    nested = '{"type": "Sequence", "normalizers": [' * 100_000 + '{"type": "NFC"}' + "]}" * 100_000
    text = json.dumps(TOKENIZER).replace('"normalizer": null', f'"normalizer": {nested}')
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="recursion limit"):
        build_from_folder(tmp_path)


def test_merges_are_never_left_to_chance(tmp_path: Path) -> None:
    model = {**TOKENIZER["model"], "dropout": 0.5}
    tokenizer = Tokenizer(*build_from_folder(write(tmp_path, model=model)))
    assert all(tokenizer.encode("ab") == [2] for _ in range(20))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_tokenizer_json_is_refused_or_works_within_a_second(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    document = {
        **TOKENIZER,
        "normalizer": replacing("bb"),
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": {**TEMPLATE, "single": [SEQUENCE]},
    }
    damaged = bytearray(json.dumps(document).encode())
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at : at + data.draw(st.integers(0, 8))] = data.draw(
            st.one_of(st.binary(max_size=4), st.sampled_from([b"null", b"9" * 12, b"-1", b"[]", b"{}", b'"']))
        )
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "tokenizer.json").write_bytes(damaged)
    start = time.process_time()
    with suppress(CheckpointError, UnsupportedError):
        tokenizer = Tokenizer(*build_from_folder(folder))
        tokenizer.decode(tokenizer.encode(TEXT))
    assert time.process_time() - start < 1


KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["a b"]},
    "llama": {"tokenizer.ggml.scores": [0.0, -1.0, -2.0, -3.0], "tokenizer.ggml.token_type": [2, 1, 1, 1]},
    "t5": {
        "tokenizer.ggml.scores": [0.0, -1.0, -2.0, -3.0],
        "tokenizer.ggml.token_type": [2, 1, 1, 1],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.precompiled_charsmap": b"\4\0\0\0\0\0\0\0ab\0",
    },
    "bert": {"tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.cls_token_id": 1},
}
BAD: tuple[Any, ...] = (
    -1, 4, 2**31, 2**40, 0.5, float("nan"), float("inf"), True, "", "x", ["a"], ["a", "a", "a", "a"],
    [""] * 4,
    [0], [-1.0, float("nan"), 0.0, 1.0], [99, 99, 99, 99], ["a" * 5000] * 4, ["\0"], b"\xff" * 9,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_gguf_metadata_that_no_tokenizer_has_is_refused_or_works_within_a_second(
    data: st.DataObject,
) -> None:
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    values: dict[str, Any] = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": ["<unk>", "a", "b", "ab"],
        **KINDS[kind],
    }
    for _ in range(data.draw(st.integers(1, 3))):
        values[data.draw(st.sampled_from(sorted(values)))] = data.draw(st.sampled_from(BAD))
    metadata = GgufMetadata(Path("bad.gguf"), {key: as_stored(value) for key, value in values.items()})
    start = time.process_time()
    with suppress(CheckpointError, UnsupportedError):
        tokenizer = Tokenizer(*build_from_gguf(metadata))
        tokenizer.decode(tokenizer.encode(TEXT))
    assert time.process_time() - start < 1


def as_stored(value: Any) -> Any:
    """As a GGUF file's reader gives it: lists are arrays, of texts or of numbers."""
    if isinstance(value, bytes):
        return np.frombuffer(value, np.uint8)
    if isinstance(value, list) and isinstance(value[0], str):
        stored, offsets = b"", [0]
        for text in value:
            stored += len(text.encode()).to_bytes(8, "little") + text.encode()
            offsets.append(len(stored))
        return StringArray(Path("bad.gguf"), memoryview(stored), offsets)
    if isinstance(value, list):
        return np.array(value, np.float32 if isinstance(value[0], float) else np.int32)
    return value
