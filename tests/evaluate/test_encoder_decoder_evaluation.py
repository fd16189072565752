"""Translations of an encoder-decoder are evaluated natively, and are those of PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from encoder_decoder_configs import ENCODER_DECODERS
from fastserve.evaluate.prediction import PredictorOptions
from fastserve.evaluate.random_model import make_byte_tokenizer
from fastserve.evaluate.task_evaluation import evaluate_folder
from tiny_models import random_encoder_decoder

SOURCES = ("Ein Hund.", "Der Hund bellt, und die Katze schläft.")
ROWS = [{"source": text, "target": "A dog."} for text in SOURCES]
TOKENS = {"decoder_start_token_id": 1, "pad_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": 2}


@pytest.mark.parametrize("name", ["t5", "marian"])
def test_what_is_written_natively_is_what_torch_writes(name: str, tmp_path: Path) -> None:
    model = random_encoder_decoder({**ENCODER_DECODERS[name], **TOKENS, "vocab_size": 300})
    model.generation_config.num_beams = 3  # evaluation is greedy all the same
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(make_byte_tokenizer(300)))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(kind))
    card = {"task": "translation", "example_length": 64}
    (tmp_path / "fastserve.json").write_text(json.dumps(card))
    native, torch = (
        evaluate_folder(tmp_path, ROWS, PredictorOptions(backend=backend, weights="f32", max_tokens=4))
        for backend in ("auto", "torch")
    )
    assert native.backend == "native"
    assert [one["text"] for one in native.predictions] == [one["text"] for one in torch.predictions]
    cut = evaluate_folder(
        tmp_path, [{"source": "ab" * 400, "target": "x"}], PredictorOptions(truncate=True, max_tokens=4)
    )
    assert cut.backend == "native"
