"""SentencePiece models that are trained for a test, by the library itself."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece


def train_pieces(lines: Iterable[str], path: Path, **settings: Any) -> sentencepiece.SentencePieceProcessor:
    """Train a model, a Unigram one unless the settings say otherwise, and write it to that file."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, num_threads=1, minloglevel=2, **settings
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def english_lines(shared_data: Path, num_characters: int = 60_000) -> list[str]:
    """Of Wikipedia, the mark of unknown words replaced, which is a piece of its own."""
    text = (shared_data / "lm_wikitext2" / "valid.txt").read_text(encoding="utf-8")
    return text[:num_characters].replace("<unk>", "word").splitlines()
