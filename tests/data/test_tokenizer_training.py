from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastserve.data import open_tokenizer, save_tokenizer, train_tokenizer
from fastserve.data.encode import find_eos_id
from fastserve.data.tokenizer_training import TOKENIZER_KINDS
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


def test_training_bpe_again_gives_the_same_tokenizer_in_another_process_too() -> None:
    code = f"from fastserve.data import *; print(train_tokenizer({TEXTS}, vocab_size=300).to_str(), end='')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, encoding="utf-8")
    assert run.stdout == train_tokenizer(TEXTS, vocab_size=300).to_str()


def test_a_vocabulary_too_small_for_bytes_and_an_unknown_kind_are_refused() -> None:
    with pytest.raises(OptionError, match="vocab_size=100"):
        train_tokenizer(TEXTS, vocab_size=100)
    with pytest.raises(OptionError, match="train_tokenizer='word2vec' is unknown"):
        train_tokenizer(TEXTS, "word2vec")
