from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastserve.cli.main import main


def test_the_document_has_one_embedding_a_text(
    model_dir: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(model_dir("all-minilm-l6-v2"))
    assert main(["embed", model, "A cat.", "A dog.", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document) == ["embeddings"]
    embeddings = np.array(document["embeddings"])
    assert embeddings.shape == (2, 384)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
    assert main(["embed", model, "A cat.", "A dog."]) == 0
    lines = capsys.readouterr().out.splitlines()
    np.testing.assert_array_equal([np.fromstring(line, sep=" ") for line in lines], embeddings)


def test_a_text_beyond_the_limit_is_refused_unless_it_may_be_cut(
    model_dir: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["embed", str(model_dir("all-minilm-l6-v2")), "hello " * 300]
    assert main(arguments) == 2
    assert "300 tokens; the model embeds at most 256" in capsys.readouterr().err
    assert main([*arguments, "--truncate"]) == 0


def test_a_text_generator_is_refused(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(shared_data / "model_stories260K")
    assert main(["embed", model, "A cat."]) == 2
    assert (
        f"the model '{model}' generates text; it has no embeddings; use an encoder" in capsys.readouterr().err
    )
