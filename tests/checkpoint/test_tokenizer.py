from __future__ import annotations

import json
import shutil
import time
import unicodedata
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from fastserve.checkpoint import open_checkpoint
from fastserve.checkpoint.folder_tokenizer import build_from_folder
from fastserve.checkpoint.gguf import read_gguf
from fastserve.checkpoint.gguf_tokenizer import _NAMED_SPLITTINGS, SPLITTINGS, build_from_gguf
from fastserve.checkpoint.sentencepiece import read_sentencepiece
from fastserve.checkpoint.splitting import cut_words
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.errors import CheckpointError, OptionError, UnsupportedError
from sentence_pieces import english_lines, train_pieces

VECTORS = ["bert-bge", "gpt-2", "llama-spm", "phi-3", "qwen2"]


def tokenizer_of(path: Path) -> Tokenizer:
    return Tokenizer.from_checkpoint(open_checkpoint(path))


def vector_path(shared_data: Path, name: str) -> Path:
    return shared_data / "tokenizer_vectors" / f"ggml-vocab-{name}.gguf"


def vector_tokenizer(shared_data: Path, name: str) -> Tokenizer:
    return Tokenizer(*build_from_gguf(read_gguf(vector_path(shared_data, name)).metadata))


def texts_of(shared_data: Path) -> list[str]:
    """The same declaration in 29 languages, a line each time."""
    files = sorted((shared_data / "lm_udhr_multilingual").glob("*.txt"))
    lines = chain.from_iterable(file.read_text(encoding="utf-8").splitlines()[:25] for file in files)
    return [line for line in lines if line.strip()] + [
        "",
        " ",
        "  a  b",
        "\n\n\t x",
        "🦙👩‍👩‍👧 e\u0301\u200b 1234½",
    ]


@pytest.mark.parametrize("name", VECTORS)
def test_the_vectors_of_llama_cpp_are_reproduced(shared_data: Path, name: str) -> None:
    path = vector_path(shared_data, name)
    inputs = Path(f"{path}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    outputs = [[int(i) for i in line.split()] for line in Path(f"{path}.out").read_text().split("\n")]
    assert len(inputs) == len(outputs) == 47
    tokenizer = vector_tokenizer(shared_data, name)
    for text, expected in zip(inputs, outputs, strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == expected, text


@pytest.mark.parametrize("name", [names[0] for names in _NAMED_SPLITTINGS])
def test_text_in_every_language_comes_back_whole_however_words_are_cut(
    shared_data: Path, write_gguf: Callable[..., Path], name: str
) -> None:
    splitting = SPLITTINGS[name]
    byte_tokens = pre_tokenizers.ByteLevel.alphabet()
    metadata = {**GPT2, "tokenizer.ggml.pre": name, "tokenizer.ggml.tokens": sorted(byte_tokens)}
    tokenizer = Tokenizer(*build_from_gguf(read_gguf(write_gguf(metadata, {})).metadata))
    for text in texts_of(shared_data):
        ids = tokenizer.encode(text)
        expected = unicodedata.normalize("NFC", text) if splitting.is_nfc else text
        assert tokenizer.decode(ids) == expected
        assert len(ids) == len(expected.encode())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama-bpe", ["HelloWorld", "'s", "Ġ", "123", "45", "Ġnaïve", "!!"]),
        ("qwen2", ["HelloWorld", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġnaïve", "!!"]),
        ("gpt-2", ["HelloWorld", "'s", "Ġ12345", "Ġnaïve", "!!"]),
        ("smollm", ["HelloWorld", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġnaïve", "!!"]),
        ("gpt-4o", ["Hello", "World's", "Ġ", "123", "45", "Ġnaïve", "!!"]),
        ("tekken", ["Hello", "World", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġnaïve", "!!"]),
    ],
)
def test_words_are_cut_as_the_models_were_trained(name: str, words: list[str]) -> None:
    cut = cut_words(SPLITTINGS[name].patterns)
    spelled = [word.replace("ï", "Ã¯") for word in words]
    assert [word for word, _ in cut.pre_tokenize_str("HelloWorld's 12345 naïve!!")] == spelled


def test_unigram_tokens_in_gguf_split_as_in_a_folder(
    shared_data: Path, write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    lines = english_lines(shared_data)
    train_pieces(lines, tmp_path / "spiece.model", vocab_size=500)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}')
    (tmp_path / "config.json").write_text("{}")
    model = read_sentencepiece(tmp_path / "spiece.model")
    metadata = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": list(model.pieces),
        "tokenizer.ggml.scores": [float(score) for score in model.scores],
        "tokenizer.ggml.token_type": [int(type_) for type_ in model.types],
        "tokenizer.ggml.precompiled_charsmap": model.charsmap,
        "tokenizer.ggml.unknown_token_id": model.unknown_id,
        "tokenizer.ggml.eos_token_id": list(model.pieces).index("</s>"),
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.remove_extra_whitespaces": True,
    }
    gguf = Tokenizer(*build_from_gguf(read_gguf(write_gguf(metadata, {})).metadata))
    folder = Tokenizer(*build_from_folder(tmp_path))
    for line in [*texts_of(shared_data), *lines[:50]]:
        if "<unk>" not in line:
            assert gguf.encode(line) == folder.encode(line), line


@pytest.mark.parametrize("name", ["gpt-2", "qwen2", "llama-spm", "phi-3"])
def test_text_in_every_language_comes_back_whole(shared_data: Path, name: str) -> None:
    tokenizer = vector_tokenizer(shared_data, name)
    for text in texts_of(shared_data):
        expected = unicodedata.normalize("NFC", text) if name == "qwen2" else text
        assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_smollm2_tokenizes_as_in_transformers(model_dir: Callable[[str], Path], shared_data: Path) -> None:
    checkpoint = open_checkpoint(model_dir("smollm2-135m-instruct"))
    ours = Tokenizer.from_checkpoint(checkpoint)
    theirs = AutoTokenizer.from_pretrained(checkpoint.path.parent, gguf_file=checkpoint.path.name)
    # It ignores tokenizer.ggml.pre; this is what the tokenizer.json that the model was published with has.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    chat = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    for text in [*texts_of(shared_data), chat, "def f(x):\n    return x ** 12345\n"]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
        assert ours.decode(ids, skip_special_tokens=False) == text
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    assert ours.vocab_size == len(theirs) == 49152
    assert {role: theirs.special_tokens_map[role] for role in ("bos_token", "eos_token", "pad_token")} == {
        role: ours.special_tokens[role] for role in ("bos_token", "eos_token", "pad_token")
    }


@pytest.mark.parametrize("name", VECTORS)
def test_no_text_has_fewer_tokens_than_its_bound(shared_data: Path, name: str) -> None:
    tokenizer = vector_tokenizer(shared_data, name)
    repeated = [
        "a" * 999,
        " " * 999,
        "-=" * 999,
        "\x04\x13" * 999,
        "e\u0301" * 999,
        "\U000e0041" * 99,
        "ᾂ" * 99,
    ]
    for text in [*texts_of(shared_data), *repeated]:
        assert tokenizer.min_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False)), text[:20]
    assert tokenizer.min_tokens("word " * 999) > 0


def test_characters_that_smollm2_has_no_token_for_do_not_count(model_dir: Callable[[str], Path]) -> None:
    tokenizer = tokenizer_of(model_dir("smollm2-135m-instruct"))
    assert tokenizer.encode("\x04" * 999) == []
    assert tokenizer.min_tokens("\x04" * 999) == 0
    assert tokenizer.min_tokens("word " * 999) == -(-5 * 999 // 81)  # 81 spaces are the longest token


def test_smollm2_builds_its_tokenizer_within_its_budget(model_dir: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(model_dir("smollm2-135m-instruct"))

    def build_seconds() -> float:
        start = time.process_time()
        Tokenizer.from_checkpoint(checkpoint)
        return time.process_time() - start

    assert min(build_seconds() for _ in range(3)) < 0.3


def test_minilm_tokenizes_as_in_transformers_and_neither_cuts_nor_pads(
    model_dir: Callable[[str], Path], shared_data: Path
) -> None:
    path = model_dir("all-minilm-l6-v2")
    ours, theirs = tokenizer_of(path), AutoTokenizer.from_pretrained(path)
    long = "word " * 400
    for text in [*texts_of(shared_data), long]:
        assert ours.encode(text) == theirs.encode(text, truncation=False), text
    assert len(ours.encode(long)) == 402
    assert len(ours.encode("short")) == 3
    assert ours.special_tokens["cls_token"] == "[CLS]"
    assert ours.special_ids == {0, 100, 101, 102, 103}


def test_stories260k_tokenizes_alike_from_gguf_tokenizer_json_and_transformers(shared_data: Path) -> None:
    folder = shared_data / "model_stories260K"
    gguf, hf = tokenizer_of(folder / "stories260K.gguf"), tokenizer_of(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    stories = (shared_data / "lm_tinyshakespeare" / "input.txt").read_text()[:20_000].split("\n\n")
    for text in [*texts_of(shared_data), *stories]:
        ids = gguf.encode(text)
        assert ids == hf.encode(text) == theirs.encode(text), text
        assert gguf.decode(ids) == hf.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == text
    assert gguf.special_tokens == hf.special_tokens
    assert gguf.bos_token_id == hf.bos_token_id == 1


def test_special_tokens_surround_a_text_only_when_asked(shared_data: Path) -> None:
    tokenizer = tokenizer_of(shared_data / "model_stories260K")
    assert tokenizer.encode("a") == [1, *tokenizer.encode("a", add_special_tokens=False)]
    assert tokenizer.decode(tokenizer.encode("a")) == "a"
    assert tokenizer.decode(tokenizer.encode("a"), skip_special_tokens=False) == "<s> a"


@pytest.mark.parametrize("flags", [{"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}])
def test_what_surrounds_a_text_is_for_tokenizer_json_to_say(
    shared_data: Path, tmp_path: Path, flags: dict[str, bool]
) -> None:
    source = shared_data / "model_stories260K"
    shutil.copyfile(source / "tokenizer.json", tmp_path / "tokenizer.json")
    stored = json.loads((source / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**stored, **flags}))
    assert Tokenizer(*build_from_folder(tmp_path)).encode("Once") == [1, 403]
    assert AutoTokenizer.from_pretrained(tmp_path).encode("Once") == [1, 403]


def test_tokens_are_spelled_as_in_the_vocabulary(shared_data: Path) -> None:
    tokenizer = vector_tokenizer(shared_data, "gpt-2")
    assert (tokenizer.token_text(262), tokenizer.token_id("Ġthe")) == ("Ġthe", 262)
    assert tokenizer.token_text(50257) is None
    assert tokenizer.token_text(-1) is None
    assert tokenizer.token_id("no such token") is None


def test_a_lone_surrogate_is_refused(shared_data: Path) -> None:
    with pytest.raises(OptionError, match=r"at character \d+ is half a pair, U\+D"):
        tokenizer_of(shared_data / "model_stories260K").encode("a\ud800b")


def test_a_folder_without_tokenizer_json_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"no tokenizer.json.*save_pretrained"):
        build_from_folder(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": {"type": "BPE", "vocab": 3}}'])
def test_a_corrupt_tokenizer_json_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="holds no valid tokenizer"):
        build_from_folder(tmp_path)


def test_a_post_processor_that_adds_an_unknown_token_is_refused(shared_data: Path, tmp_path: Path) -> None:
    stored = json.loads((shared_data / "model_stories260K" / "tokenizer.json").read_text())
    stored["post_processor"]["special_tokens"] = {}
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="holds no valid tokenizer"):
        build_from_folder(tmp_path)


GPT2 = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab"],
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, UnsupportedError, "'rwkv', supported in GGUF are gpt2, llama, t5"),
        ({"tokenizer.ggml.pre": "viking"}, UnsupportedError, "splits words by 'viking'.*supported are gpt-2"),
        ({"tokenizer.ggml.pre": None}, UnsupportedError, "splits words by None"),
        ({"tokenizer.ggml.tokens": None}, CheckpointError, "a tokenizer without tokens"),
        ({"tokenizer.ggml.merges": ["a z"]}, CheckpointError, "no two tokens that make a third"),
        ({"tokenizer.ggml.merges": ["ab"]}, CheckpointError, "no two tokens that make a third"),
        ({"tokenizer.ggml.token_type": [1, 1]}, CheckpointError, "2 token types for 3 tokens"),
        ({"tokenizer.ggml.bos_token_id": 3}, CheckpointError, "bos_token_id is 3, the vocabulary has 3"),
        ({"tokenizer.ggml.model": "llama"}, CheckpointError, "lacks a score for each of its 3 tokens"),
    ],
)  # fmt: skip
def test_a_gguf_tokenizer_that_cannot_be_built_says_why(
    write_gguf: Callable[..., Path], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    metadata = {key: value for key, value in {**GPT2, **change}.items() if value is not None}
    with pytest.raises(error, match=message):
        build_from_gguf(read_gguf(write_gguf(metadata, {})).metadata)
