"""Calibration text becomes sequences as the model is used to them; too little of it is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.compress.calibration import calibration_tokens
from fastserve.errors import DataError


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Path:
    return shared_data / "model_stories260K"


def test_windows_of_a_decoder_have_one_length_and_are_drawn_by_the_seed(
    stories: Path, shared_data: Path
) -> None:
    checkpoint = open_checkpoint(stories)
    file = shared_data / "lm_tinyshakespeare" / "input.txt"
    draws = [
        calibration_tokens(checkpoint, file, num_sequences=5, length=32, seed=seed) for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert [len(ids) for ids in draws[0]] == [32] * 5
    beginning = Tokenizer.from_checkpoint(checkpoint).encode("")
    assert beginning
    assert all(ids[: len(beginning)] == beginning for ids in draws[0])


def test_rows_of_an_encoder_keep_their_special_tokens(
    tmp_path: Path, model_dir: Callable[[str], Path]
) -> None:
    checkpoint = open_checkpoint(model_dir("all-minilm-l6-v2"))
    file = tmp_path / "rows.jsonl"
    rows = [{"text": "A short one.", "label": "a"}, {"text": "Many words, " * 20, "label": "b"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    short, long = calibration_tokens(checkpoint, file, num_sequences=2, length=16, seed=0)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    assert short == tokenizer.encode("A short one.")
    assert len(long) == 16
    assert (long[0], long[-1]) == (short[0], short[-1])


def test_too_little_text_says_how_much_there_is(tmp_path: Path, stories: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Once upon a time, there was a little girl. " * 20)
    with pytest.raises(DataError, match=r"comes to \d sequences of 128 tokens, and 64 are needed"):
        calibration_tokens(open_checkpoint(stories), file, num_sequences=64, length=128, seed=0)


def test_no_file_is_an_error(stories: Path) -> None:
    with pytest.raises(DataError, match="no calibration text"):
        calibration_tokens(open_checkpoint(stories), None, num_sequences=1, length=16, seed=0)
