"""Folders from before tokenizer.json, read here and by transformers."""

from __future__ import annotations

import json
import time
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.checkpoint.folder_tokenizer import build_from_folder
from fastserve.checkpoint.gguf import read_gguf
from fastserve.checkpoint.gguf_tokenizer import build_from_gguf
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.errors import CheckpointError, UnsupportedError
from sentence_pieces import english_lines, train_pieces


def build(folder: Path) -> Tokenizer:
    return Tokenizer(*build_from_folder(folder))


def write_config(folder: Path, class_name: str, **config: Any) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": class_name, **config}))
    return folder


@pytest.fixture(scope="module")
def texts(shared_data: Path) -> list[str]:
    languages = sorted((shared_data / "lm_udhr_multilingual").glob("*.txt"))
    foreign = [unicodedata.normalize("NFC", file.read_text(encoding="utf-8")[:300]) for file in languages]
    text = (shared_data / "lm_wikitext2" / "valid.txt").read_text(encoding="utf-8")[:20_000]
    lines = text.replace("<unk>", "word").splitlines()
    odd = ["", "a", "  a  b ", "\n\n\t x", "🦙 e\u0301\u200b 1234½ ﬁ Ⅷ", "Don't ``quote''", "12,345"]
    return [*foreign, *(line.strip() for line in lines if line.strip()), *odd]


@pytest.fixture(scope="module")
def gpt2_files(shared_data: Path) -> Callable[[Path], Path]:
    """Writes vocab.json and merges.txt, with RoBERTa's special tokens behind GPT-2's."""
    metadata = read_gguf(shared_data / "tokenizer_vectors" / "ggml-vocab-gpt-2.gguf").metadata
    tokens = list(metadata.texts("tokenizer.ggml.tokens") or ())
    merges = list(metadata.texts("tokenizer.ggml.merges") or ())
    more = [token for token in ("<s>", "<pad>", "</s>", "<unk>", "<mask>") if token not in tokens]

    def write(folder: Path) -> Path:
        vocabulary = {token: id_ for id_, token in enumerate([*tokens, *more])}
        (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        return folder

    return write


@pytest.fixture(scope="module")
def word_pieces(shared_data: Path) -> list[str]:
    metadata = read_gguf(shared_data / "tokenizer_vectors" / "ggml-vocab-bert-bge.gguf").metadata
    vocabulary = build_from_gguf(metadata)[0].get_vocab(with_added_tokens=True)
    return sorted(vocabulary, key=vocabulary.__getitem__)


def train(folder: Path, shared_data: Path, name: str, **settings: Any) -> Path:
    usual = {"vocab_size": 600, "hard_vocab_limit": False, "character_coverage": 0.98}
    train_pieces(english_lines(shared_data), folder / name, **usual | settings)
    return folder


def check_as_in_transformers(folder: Path, class_name: str, texts: list[str], specials: list[str]) -> None:
    ours = build(folder)
    theirs = getattr(transformers, class_name).from_pretrained(folder)
    for text in [*texts, *(f"one {token} two" for token in specials)]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ), text
    assert ours.special_tokens == {
        role: token for role, token in theirs.special_tokens_map.items() if role in ours.special_tokens
    }
    assert ours.vocab_size == len(theirs)
    pair = ours._backend.encode("a text", "and another")
    assert pair.ids == theirs("a text", "and another")["input_ids"]


@pytest.mark.parametrize(
    ("class_name", "config"),
    [
        ("GPT2Tokenizer", {}),
        ("GPT2Tokenizer", {"add_prefix_space": True, "add_bos_token": True, "bos_token": "</s>"}),
        ("Qwen2Tokenizer", {"bos_token": None}),
        ("RobertaTokenizer", {}),
        ("BartTokenizer", {}),
    ],
)
def test_byte_pairs_in_vocab_json_and_merges_txt(
    tmp_path: Path,
    gpt2_files: Callable[[Path], Path],
    texts: list[str],
    class_name: str,
    config: dict[str, Any],
) -> None:
    write_config(gpt2_files(tmp_path), class_name, **config)
    check_as_in_transformers(tmp_path, class_name, texts, ["<|endoftext|>"])
    assert build(tmp_path).decode(build(tmp_path).encode("स्वतन्त्रता 自由")).strip() == "स्वतन्त्रता 自由"


@pytest.mark.parametrize("class_name", ["BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer"])
@pytest.mark.parametrize("config", [{}, {"do_lower_case": False}, {"tokenize_chinese_chars": False}])
def test_word_pieces_in_vocab_txt(
    tmp_path: Path, word_pieces: list[str], texts: list[str], class_name: str, config: dict[str, Any]
) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(word_pieces) + "\n", encoding="utf-8")
    write_config(tmp_path, class_name, **config)
    check_as_in_transformers(tmp_path, class_name, texts, ["[MASK]"])


def test_the_word_pieces_of_mpnet(tmp_path: Path, word_pieces: list[str], texts: list[str]) -> None:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *word_pieces, "<mask>"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    write_config(tmp_path, "MPNetTokenizer")
    check_as_in_transformers(tmp_path, "MPNetTokenizer", texts, ["<mask>"])


def test_sentencepiece_byte_pairs_of_llama(tmp_path: Path, shared_data: Path, texts: list[str]) -> None:
    as_it_is = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    train(tmp_path, shared_data, "tokenizer.model", model_type="bpe", byte_fallback=True, **as_it_is)
    write_config(tmp_path, "LlamaTokenizer", legacy=False, add_bos_token=True, add_eos_token=True)
    specials = ["</s>"]
    check_as_in_transformers(tmp_path, "LlamaTokenizer", texts, specials)
    ours = build(tmp_path)
    for text in texts:
        assert ours.decode(ours.encode(text)) == text.removeprefix(" ")


def test_sentencepiece_byte_pairs_of_gemma(tmp_path: Path, shared_data: Path, texts: list[str]) -> None:
    train(
        tmp_path,
        shared_data,
        "tokenizer.model",
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=["<start_of_turn>", "\n\n"],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
    )
    decoder = {"4": {"content": "<start_of_turn>", "special": True, "normalized": False}}
    write_config(tmp_path, "GemmaTokenizer", add_bos_token=True, added_tokens_decoder=decoder)
    ours = build(tmp_path)
    assert ours.encode("<start_of_turn>user\n\nHi")[:2] == [2, 4]
    assert {0, 1, 2, 3, 4} <= ours.special_ids
    assert 5 not in ours.special_ids
    for text in texts:
        assert ours.decode(ours.encode(text)) == text


UNIGRAMS = {
    "T5Tokenizer": {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    "AlbertTokenizer": {
        "pad_id": 0,
        "unk_id": 1,
        "bos_id": -1,
        "eos_id": -1,
        "control_symbols": ["[CLS]", "[SEP]", "[MASK]"],
    },
    "XLMRobertaTokenizer": {},
}


@pytest.mark.parametrize("class_name", UNIGRAMS)
def test_unigram_models(tmp_path: Path, shared_data: Path, texts: list[str], class_name: str) -> None:
    name = "sentencepiece.bpe.model" if class_name.startswith("XLM") else "spiece.model"
    train(tmp_path, shared_data, name, model_type="unigram", **UNIGRAMS[class_name])
    write_config(tmp_path, class_name)
    mask = {"T5Tokenizer": "<extra_id_7>", "AlbertTokenizer": "[MASK]"}.get(class_name, "<mask>")
    ours = build(tmp_path)
    theirs = getattr(transformers, class_name).from_pretrained(tmp_path)
    assert ours.token_id(mask) == theirs.convert_tokens_to_ids(mask)
    assert ours.vocab_size == len(theirs)
    for text in texts:
        assert ours.encode(text) == theirs.encode(text), text
    assert ours._backend.encode("a b", "c").ids == theirs("a b", "c")["input_ids"]


def write_marian(folder: Path, shared_data: Path, drop: str = "") -> Path:
    """English to French: one vocabulary of both, in the order of Marian's own files."""
    train(folder, shared_data, "source.spm", model_type="unigram")
    french = (shared_data / "lm_udhr_multilingual" / "fra.txt").read_text(encoding="utf-8")
    train_pieces(french.splitlines(), folder / "target.spm", vocab_size=400, hard_vocab_limit=False)
    found: dict[str, None] = {"</s>": None, "<unk>": None, ">>fra<<": None}
    for name in ("target.spm", "source.spm"):
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / name))
        found |= dict.fromkeys(pieces.id_to_piece(id_) for id_ in range(3, len(pieces)))
    found.pop(drop, None)
    vocabulary = {piece: id_ for id_, piece in enumerate([*found, "<pad>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    return write_config(folder, "MarianTokenizer", source_lang="eng", target_lang="fra")


@pytest.mark.filterwarnings("ignore:Recommended")
def test_marian_cuts_sources_by_one_model_and_writes_targets_by_another(
    tmp_path: Path, shared_data: Path, texts: list[str]
) -> None:
    write_marian(tmp_path, shared_data)
    ours = build(tmp_path)
    theirs = transformers.MarianTokenizer.from_pretrained(tmp_path)
    assert ours.vocab_size == len(theirs)
    ascii_texts = [text for text in texts if text.isascii() and "``" not in text]
    for text in [*ascii_texts, ">>fra<< Hello", "one </s> two"]:
        assert ours.encode(text) == theirs.encode(text), text
    for text in ("Tous les êtres humains naissent libres et égaux.", "Chacun a des devoirs."):
        target = theirs(text_target=text)["input_ids"]
        assert ours.decode(target) == theirs.decode(target, skip_special_tokens=True) == text
    assert ours.encode("\U000f0000a") == ours.encode("a")


@pytest.mark.filterwarnings("ignore:Recommended")
def test_a_piece_that_marians_vocabulary_lacks_is_cut_smaller(tmp_path: Path, shared_data: Path) -> None:
    write_marian(tmp_path, shared_data, drop="▁the")
    ours = build(tmp_path)
    assert ours.decode(ours.encode("the end")) == "the end"
    unknown = transformers.MarianTokenizer.from_pretrained(tmp_path).encode("the end")
    assert 1 in unknown
    assert 1 not in ours.encode("the end")


@pytest.mark.parametrize(
    ("vocabulary", "says"),
    [
        ({"</s>": 0, "<unk>": 2}, "other ids than those from 0 to 1"),
        ({"</s>": 0, "<unk>": "1"}, "other ids"),
        ({"</s>": 0, "a": 1}, "lacks '<unk>'"),
    ],
)
def test_a_vocabulary_of_marian_that_is_none_is_refused(
    vocabulary: dict[str, Any], says: str, tmp_path: Path, shared_data: Path
) -> None:
    write_marian(tmp_path, shared_data)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(CheckpointError, match=says):
        build(tmp_path)


def test_added_tokens_have_the_ids_that_the_folder_declares(
    tmp_path: Path, gpt2_files: Callable[[Path], Path]
) -> None:
    write_config(gpt2_files(tmp_path), "Qwen2Tokenizer", additional_special_tokens=["<|im_start|>"])
    next_id = build(tmp_path).vocab_size - 1
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": next_id + 1, "<think>": next_id}))
    ours = build(tmp_path)
    assert ours.encode("<|im_start|><think>") == [next_id + 1, next_id]
    assert next_id + 1 in ours.special_ids
    assert next_id not in ours.special_ids
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<think>": next_id + 9}))
    with pytest.raises(CheckpointError, match=r"'<think>' with id \d+, its vocabulary gives it \d+"):
        build(tmp_path)


def test_the_class_follows_from_the_model_where_none_is_named(tmp_path: Path, word_pieces: list[str]) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(word_pieces) + "\n", encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert build(tmp_path).encode("hi") == [101, 7632, 102]


@pytest.mark.parametrize(
    ("files", "error", "says"),
    [
        ({}, UnsupportedError, r"no tokenizer.json; supported without it are GPT2Tokenizer.*save_pretrained"),
        ({"tokenizer_config.json": '{"tokenizer_class": "X"}'}, UnsupportedError, "tokenizer of class 'X'"),
        ({"tokenizer_config.json": '{"tokenizer_class": ["a"]}'}, UnsupportedError, "no tokenizer.json"),
        ({"vocab.json": None}, CheckpointError, "vocab.json cannot be read"),
        ({"merges.txt": None}, CheckpointError, "merges.txt cannot be read"),
        ({"vocab.json": "[]"}, CheckpointError, "a JSON list"),
        ({"vocab.json": '{"a": "b"}'}, CheckpointError, "no valid tokenizer"),
        ({"vocab.json": '{"a": -1}'}, CheckpointError, "no valid tokenizer"),
        ({"vocab.json": '{"a": 1, "a": 2}'}, CheckpointError, "'a' is repeated"),
        ({"merges.txt": "a z"}, CheckpointError, "no valid tokenizer"),
        ({"merges.txt": "a b c"}, CheckpointError, "merges 'a b c', which are no two tokens"),
        ({"merges.txt": b"\xff"}, CheckpointError, "not valid UTF-8"),
        ({"added_tokens.json": '{"x": 99}'}, CheckpointError, "'x' with id 99, its vocabulary gives it"),
        ({"added_tokens.json": '{"x": -1}'}, CheckpointError, "the id '-1', which is none"),
        ({"special_tokens_map.json": "3"}, CheckpointError, "a JSON int"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_read_says_why(
    tmp_path: Path, files: dict[str, Any], error: type[Exception], says: str
) -> None:
    if files and "tokenizer_config.json" not in files:
        write_config(tmp_path, "GPT2Tokenizer")
        files = {"vocab.json": '{"a": 0, "b": 1, "ab": 2}', "merges.txt": "a b\n", **files}
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=says):
        build(tmp_path)


FUZZED = {
    "vocab.json": b'{"a": 0, "b": 1, "ab": 2, "\xc4\xa0": 3}',
    "merges.txt": b"#version: 0.2\na b\n",
    "tokenizer_config.json": (
        b'{"tokenizer_class": "GPT2Tokenizer", "bos_token": {"content": "a"}, "add_prefix_space": false,'
        b' "added_tokens_decoder": {"4": {"content": "<x>", "lstrip": true, "special": true}}}'
    ),
}


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused_or_work_within_a_second(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    for name, content in FUZZED.items():
        (folder / name).write_bytes(content)
    name = data.draw(st.sampled_from(sorted(FUZZED)))
    damaged = bytearray(FUZZED[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    (folder / name).write_bytes(damaged)
    start = time.process_time()
    with suppress(CheckpointError, UnsupportedError):
        build(folder).encode("ab <x> ba")
    assert time.process_time() - start < 1
