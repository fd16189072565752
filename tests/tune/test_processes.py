"""Two processes that share each batch learn as one does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from fastserve.errors import OptionError
from fastserve.tune import TuneOptions, TuneResult, tune
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


@pytest.mark.slow
def test_processes_that_share_the_weights_have_the_losses_of_one_and_resume_exactly(
    tiny_encoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    train, dev = write_rows("train", film_rows(48)), write_rows("dev", film_rows(8))
    options = TuneOptions(
        epochs=2, batch_size=8, learning_rate=2e-3, device="cpu", dropout=0.0, max_length=32, accumulation=2
    )
    sharded = replace(options, processes=2, shard=True)

    def run(name: str, options: TuneOptions, **more: Any) -> TuneResult:
        return tune(
            "text-classification",
            model=str(tiny_encoder),
            train=train,
            dev=dev,
            on_problem=OVERLAP_KEPT,
            output=tmp_path / name,
            options=options,
            **more,
        )

    def log_of(result: TuneResult, name: str) -> list[float]:
        lines = (result.path / "training" / "log.jsonl").read_text("utf-8").splitlines()
        return [entry[name] for line in lines if name in (entry := json.loads(line))]

    one, two = run("one", options), run("two", sharded)
    for name in ("loss", "eval_loss", "grad_norm"):
        assert log_of(one, name)
        assert log_of(two, name) == pytest.approx(log_of(one, name), rel=1e-4)
    left, right = (load_file(result.path / "model.safetensors") for result in (one, two))
    assert left.keys() == right.keys()
    for name, values in left.items():
        assert right[name] == pytest.approx(values, abs=1e-5), name

    def stop(step: int, metrics: dict[str, float]) -> None:
        if step > 6:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run("again", sharded, on_evaluate=stop)
    again = run("again", sharded, resume=True)
    assert again.resumed_at == 6
    resumed = load_file(again.path / "model.safetensors")
    assert all((resumed[name] == values).all() for name, values in right.items())


def test_weights_that_nobody_shares_are_not_sharded() -> None:
    with pytest.raises(OptionError, match="shard shares the weights among processes, and there is one"):
        TuneOptions(shard=True)
    with pytest.raises(OptionError, match="shard cannot be had with optimizer='adamw-8bit'"):
        TuneOptions(shard=True, processes=2, optimizer="adamw-8bit")
    with pytest.raises(OptionError, match="shard cannot be had with optimizer='adafactor'"):
        TuneOptions(shard=True, processes=2, optimizer="adafactor")
