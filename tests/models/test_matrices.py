from __future__ import annotations

from pathlib import Path

import pytest
from family_table import CONFIGS, save

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.models.matrices import find_matrices


@pytest.mark.parametrize(
    ("model_type", "head", "words"),
    [
        ("llama", "lm_head.weight", "model.embed_tokens.weight"),
        ("gpt_neox", "embed_out.weight", "gpt_neox.embed_in.weight"),
        ("gemma2", None, "model.embed_tokens.weight"),
        ("mpnet", None, "embeddings.word_embeddings.weight"),
        ("t5", None, "shared.weight"),
        ("marian", None, "model.shared.weight"),
    ],
)
def test_tables_are_the_words_and_the_head(
    model_type: str, head: str | None, words: str, tmp_path: Path
) -> None:
    assert model_type in CONFIGS
    save(model_type, tmp_path)
    matrices = find_matrices(open_checkpoint(tmp_path))
    assert set(matrices.tables) == {words, *([head] if head else [])}
    assert matrices.linears
    assert not set(matrices.linears) & set(matrices.tables)


def test_matrices_of_an_encoder_decoder_are_those_of_both(tmp_path: Path) -> None:
    save("t5", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    matrices = find_matrices(checkpoint)
    kept = {name for name in checkpoint.tensors if "norm" in name or "relative_attention_bias" in name}
    assert {*matrices.linears, *matrices.tables} == set(checkpoint.tensors) - kept
