"""Two processes that share each batch learn as one does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastserve.errors import OptionError
from fastserve.tune import TuneOptions, tune
from tune.conftest import OVERLAP_KEPT, film_rows

WriteRows = Callable[[str, list[dict[str, Any]]], Path]


def test_two_processes_have_the_losses_of_one(
    tiny_encoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    train, dev = write_rows("train", film_rows(48)), write_rows("dev", film_rows(8))
    # Without dropout: each process draws its own.
    options = TuneOptions(
        epochs=2, batch_size=8, learning_rate=2e-3, device="cpu", dropout=0.0, max_length=32
    )
    seen: list[int] = []
    logs = []
    for number in (1, 2):
        result = tune(
            "text-classification",
            model=str(tiny_encoder),
            train=train,
            dev=dev,
            on_problem=OVERLAP_KEPT,
            output=tmp_path / f"out{number}",
            options=replace(options, processes=number),
            on_evaluate=lambda step, metrics: seen.append(step),
        )
        text = (result.path / "training" / "log.jsonl").read_text("utf-8")
        logs.append([json.loads(line) for line in text.splitlines()])
    assert seen == [6, 12, 6, 12]
    for name in ("loss", "eval_loss"):
        one, two = ([entry[name] for entry in log if name in entry] for log in logs)
        assert one
        assert two == pytest.approx(one, rel=1e-4)


def test_a_batch_that_processes_cannot_share_is_refused() -> None:
    with pytest.raises(OptionError, match="batch_size=9 is not a multiple of processes x accumulation, 2"):
        TuneOptions(batch_size=9, processes=2)
