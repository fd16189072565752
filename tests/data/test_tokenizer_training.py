from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastserve.data import open_tokenizer, save_tokenizer, train_tokenizer
from fastserve.data.encode import find_eos_id
from fastserve.data.tokenizer_training import TOKENIZER_KINDS, settle_scores
from fastserve.errors import OptionError

TEXTS = ["The lowest of the low, lower still.", "Öl und Übermut: naïve Wörter", "日本語の本"] * 30


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_a_trained_tokenizer_is_opened_by_us_and_by_transformers(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = train_tokenizer(TEXTS, kind, vocab_size=320)
    assert 16 < tokenizer.get_vocab_size() <= 320
    save_tokenizer(tokenizer, kind, tmp_path)
    ours, theirs = open_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS[:3], "unseen words"):
        assert ours.encode(text).ids == theirs(text)["input_ids"] == tokenizer.encode(text).ids
    assert ours.decode(ours.encode("lower still").ids) == "lower still"
    assert find_eos_id(tmp_path) == theirs.eos_token_id


def test_byte_level_tokens_give_back_any_text() -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    for text in ("  two  spaces\n\ttab", "🚀 ß \x00", *TEXTS[:3]):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_training_again_gives_the_same_tokenizer_in_another_process_too(kind: str) -> None:
    code = f"""from fastserve.data import *
print(train_tokenizer({TEXTS}, {kind!r}, vocab_size=300).to_str(), end="")"""
    here = train_tokenizer(TEXTS, kind, vocab_size=300).to_str()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8"}
        command = [sys.executable, "-c", code]
        run = subprocess.run(command, capture_output=True, check=True, encoding="utf-8", env=environment)
        assert run.stdout == here


def test_word_pieces_are_those_of_the_library_itself() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    theirs = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    theirs.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=75, special_tokens=["[UNK]"], show_progress=False)
    texts = ["low lower lowest slow slower", "new newer newest"] * 5
    theirs.train_from_iterator(texts, trainer)
    ours = train_tokenizer(texts, "wordpiece", vocab_size=79)
    for word in [
        "low",
        "lower",
        "lowest",
        "slow",
        "slower",
        "new",
        "newer",
        "newest",
    ]:  # there is room for all
        assert ours.encode(word, add_special_tokens=False).tokens == theirs.encode(word).tokens == [word]
    letters = [
        {token for token in known if len(token.removeprefix("##")) == 1}
        for known in (ours.get_vocab(), theirs.get_vocab())
    ]
    assert letters[0] == letters[1]
    added = {token.content for token in ours.get_added_tokens_decoder().values()}
    assert added == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_a_vocabulary_without_room_for_all_characters_is_refused(kind: str) -> None:
    texts = ["".join(chr(0x4E00 + at) for at in range(60))] * 3
    with pytest.raises(OptionError, match="vocab_size=40 has no room for the characters"):
        train_tokenizer(texts, kind, vocab_size=40)


def test_scores_that_are_dealt_out_by_chance_are_settled() -> None:
    one = {"▁a": -2.00000000001, "x": -9.0, "y": -8.9999, "z": -8.9998, "w": -9.0, "b": -5.25}
    other = {"▁a": -2.00000000003, "z": -9.0, "x": -8.9999, "y": -8.9998, "w": -9.0, "b": -5.25}
    assert settle_scores(one) == settle_scores(other)
    assert settle_scores(one)[:3] == [("▁a", -2.0), ("b", -5.25), ("w", -9.0)]


def test_a_vocabulary_too_small_for_bytes_and_an_unknown_kind_are_refused() -> None:
    with pytest.raises(OptionError, match="vocab_size=100"):
        train_tokenizer(TEXTS, vocab_size=100)
    with pytest.raises(OptionError, match="train_tokenizer='word2vec' is unknown"):
        train_tokenizer(TEXTS, "word2vec")
