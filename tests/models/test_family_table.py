from __future__ import annotations

from pathlib import Path

import family_table
import numpy as np
import pytest

from fastserve.models.family import DECODER_FAMILIES, ENCODER_DECODER_FAMILIES, ENCODER_FAMILIES


def test_every_family_has_its_row() -> None:
    families = {*DECODER_FAMILIES, *ENCODER_FAMILIES, *ENCODER_DECODER_FAMILIES}
    assert {*family_table.CONFIGS, *family_table.TEXT_PARTS} == families


@pytest.mark.parametrize("model_type", family_table.CONFIGS)
def test_the_row_of_a_family_says_what_opens(model_type: str, tmp_path: Path) -> None:
    row = family_table.row(model_type, tmp_path)
    lines = family_table.DOCUMENT.read_text(encoding="utf-8").splitlines()
    assert row in lines, f"write docs/models.md again: python {family_table.SCRIPT}"


def test_a_model_that_computes_something_else_is_no_row(tmp_path: Path) -> None:
    expected = family_table.save("bert", tmp_path)
    assert family_table.opens(tmp_path, expected, "torch", 1.0)
    with pytest.raises(AssertionError):
        family_table.opens(tmp_path, expected + np.float32(1e-2), "torch", 1.0)
    with pytest.raises(AssertionError):
        family_table.opens(tmp_path, np.roll(expected, 1, axis=1), "torch", 0.8)
