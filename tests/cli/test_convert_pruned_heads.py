"""An encoder that heads were pruned from becomes one that others open."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compress.working_models import make_context, open_working_model, random_sequences
from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.cli.main import main
from fastserve.compress.artifact import write_artifact
from fastserve.compress.prune.structured import Structured
from fastserve.compress.quantize.step import Rtn
from fastserve.engine.pipeline import pipeline
from fastserve.errors import UnsupportedError
from fastserve.tune import tune
from tiny_heads import open_with_transformers, run_with_transformers, save_bert_head, softmax
from tune.conftest import film_rows, write_rows

__all__ = ["write_rows"]

pytestmark = pytest.mark.usefixtures("empty_store")
ENDING = "ForSequenceClassification"
TEXT = "the cat sat in london"


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """A classifier with three of its four heads, int8."""
    folder = save_bert_head(
        tmp_path / "source", ENDING, labels=["good", "bad"], card={"task": "text-classification"}
    )
    context = make_context(tmp_path, calibration=random_sequences(90, 8, 16))
    model = Structured(heads=0.25, neurons=0.2, multiple=1).run(open_working_model(folder), context)
    write_artifact(Rtn(bits=8).run(model, context), tmp_path / "pruned", {})
    return tmp_path / "pruned"


def test_transformers_opens_what_convert_writes_and_agrees_with_the_smaller_model(
    pruned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert json.loads((pruned / "config.json").read_text("utf-8"))["num_attention_heads"] == 3
    output = pruned.parent / "whole"
    command = ["convert", str(pruned), "--to", "safetensors", "--weights", "f32"]
    assert main([*command, "--output", str(output)]) == 0
    assert "21 tensors given zeros in place of heads that were pruned" in capsys.readouterr().out
    model, tokenizer = open_with_transformers(output, ENDING)
    assert model.config.num_attention_heads == 4
    logits = run_with_transformers(model, tokenizer([TEXT]))["logits"][0]
    with pipeline("text-classification", pruned, weights="f32") as opened:
        (found,) = opened.predict([{"text": TEXT}])
    expected = softmax(logits)
    assert found["label"] == ["good", "bad"][int(np.argmax(expected))]
    assert found["score"] == pytest.approx(float(expected.max()), abs=1e-4)


def test_tuning_the_smaller_model_names_what_is_missing_and_the_remedy(
    pruned: Path, write_rows: Callable[..., Path]
) -> None:
    with pytest.raises(UnsupportedError, match=r"no 'bert' of 3 heads of 6, 24 wide"):
        tune(
            "text-classification",
            model=str(pruned),
            train=write_rows("rows", film_rows(8)),
            output=pruned.parent / "out",
        )


def test_gguf_has_whole_heads_too(pruned: Path) -> None:
    output = pruned.parent / "gguf"
    command = ["convert", str(pruned), "--to", "gguf", "--weights", "f32", "--output", str(output)]
    assert main(command) == 0
    assert open_checkpoint(output).config["num_attention_heads"] == 4
