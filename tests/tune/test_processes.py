"""Two processes that share each batch learn as one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from fastserve import pipeline
from fastserve.errors import OptionError
from fastserve.tune import TuneOptions, TuneResult, tune
from tune.conftest import OVERLAP_KEPT, film_rows

torch = pytest.importorskip("torch")

WriteRows = Callable[[str, list[dict[str, Any]]], Path]


def test_two_processes_learn_what_one_does_whatever_is_left_for_the_last_batch(
    tiny_encoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    """Of 41 rows one is left, for one of the two."""
    # Without dropout: each process draws its own. Slowly, so that gradients stay far above their last digits.
    options = TuneOptions(
        epochs=2, batch_size=8, learning_rate=5e-4, device="cpu", dropout=0.0, max_length=32
    )
    seen: list[int] = []
    how: dict[str, Any] = {"model": tiny_encoder, "write_rows": write_rows, "rows": 41}
    how["on_evaluate"] = lambda step, metrics: seen.append(step)
    one, two = (
        run_films(tmp_path / f"out{number}", replace(options, processes=number), **how) for number in (1, 2)
    )
    assert seen == [6, 12, 6, 12]
    assert_learned_alike(one, two)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("tiny_decoder", {"method": "lora", "adapter_dropout": 0.0}),
        ("tiny_decoder", {"method": "prefix", "learning_rate": 1e-2}),
        ("tiny_encoder", {"method": "ia3", "accumulation": 4}),
        ("tiny_encoder", {"shard": True}),
        ("tiny_encoder", {"processes": 4, "tensor_parallel": 2}),
    ],
)
def test_small_weights_and_parts_of_weights_are_learned_alike_where_a_row_is_left(
    model: str,
    changes: dict[str, Any],
    request: pytest.FixtureRequest,
    write_rows: WriteRows,
    tmp_path: Path,
) -> None:
    options = TuneOptions(
        **{"epochs": 3, "batch_size": 8, "learning_rate": 2e-3, "device": "cpu", "max_length": 32}
        | {"dropout": 0.0, "processes": 2}
        | changes
    )
    alone = replace(options, processes=1, tensor_parallel=1, shard=False)
    how: dict[str, Any] = {"model": request.getfixturevalue(model), "write_rows": write_rows, "rows": 41}
    assert_learned_alike(
        run_films(tmp_path / "one", alone, **how), run_films(tmp_path / "two", options, **how)
    )


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


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory, word_tokenizer: Any) -> Path:
    """A decoder whose heads share keys by two, and have norms of their own."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("qwen3")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(word_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


SHARED_MATRICES = TuneOptions(
    epochs=3,
    batch_size=8,
    accumulation=2,
    learning_rate=2e-3,
    dropout=0.0,
    max_length=32,
    device="cpu",
    eval_steps=3,
)


def log_of(result: TuneResult, name: str) -> list[float]:
    lines = (result.path / "training" / "log.jsonl").read_text("utf-8").splitlines()
    return [entry[name] for line in lines if name in (entry := json.loads(line))]


def run_films(
    output: Path, options: TuneOptions, *, model: Path, write_rows: WriteRows, rows: int = 44, **more: Any
) -> TuneResult:
    """Classify films; of 44 rows an epoch's last batch is short."""
    return tune(
        "text-classification",
        model=str(model),
        train=write_rows("train", film_rows(rows)),
        dev=write_rows("dev", film_rows(8)),
        on_problem=OVERLAP_KEPT,
        output=output,
        options=options,
        **more,
    )


def assert_learned_alike(one: TuneResult, two: TuneResult) -> None:
    """Curves within 1e-5, and folders that differ in the last digits of weights alone."""
    for name in ("loss", "eval_loss", "grad_norm"):
        assert log_of(one, name)
        assert log_of(two, name) == pytest.approx(log_of(one, name), rel=1e-5), name
    assert one.metrics == pytest.approx(two.metrics, rel=1e-5)
    left, right = (load_file(result.path / "model.safetensors") for result in (one, two))
    assert left.keys() == right.keys()
    for name, values in left.items():
        assert right[name].dtype == values.dtype
        assert right[name] == pytest.approx(values, abs=1e-5), name
    files = [
        sorted(str(path.relative_to(result.path)) for path in result.path.rglob("*")) for result in (one, two)
    ]
    assert files[0] == files[1]
    for name in ("config.json", "tokenizer.json"):
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes()


def test_processes_that_share_matrices_learn_as_one_does(
    tiny_qwen3: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"model": tiny_qwen3, "write_rows": write_rows}
    two = replace(SHARED_MATRICES, processes=2, tensor_parallel=2, keep_checkpoints=True)
    results = [
        run_films(tmp_path / "one", SHARED_MATRICES, **how),
        run_films(tmp_path / "two", two, **how),
    ]
    assert_learned_alike(*results)
    # By the native runtime, which knows nothing of how a model was trained.
    scores = [
        [one["score"] for one in pipeline("text-classification", str(result.path))(["a bad film", "good"])]
        for result in results
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)

    checkpoint = tmp_path / "two.run" / "checkpoints" / "checkpoint-18"
    parts = [torch.load(checkpoint / f"shard_{rank}.pt")["weights"] for rank in (0, 1)]
    shapes = {name: values.shape for name, values in results_weights(results[1]).items()}
    halved = {name for name, values in parts[0].items() if values.numel() * 2 == shapes[name].numel()}
    assert len(halved) == 2 * 7  # q, k, v, o, gate, up and down of two layers
    for name in parts[0].keys() - halved:  # what is whole stays the same in both, to the bit
        assert torch.equal(parts[0][name], parts[1][name]), name


def results_weights(result: TuneResult) -> dict[str, Any]:
    return {name: torch.from_numpy(v) for name, v in load_file(result.path / "model.safetensors").items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "changes", "processes"),
    [
        ("tiny_encoder", {}, {"processes": 2, "tensor_parallel": 2}),
        ("tiny_encoder", {"method": "last-layers", "last_layers": 1}, {"processes": 2, "tensor_parallel": 2}),
        ("tiny_decoder", {"gradient_checkpointing": True}, {"processes": 2, "tensor_parallel": 2}),
        ("tiny_decoder", {}, {"processes": 4, "tensor_parallel": 4}),
        ("tiny_encoder", {}, {"processes": 4, "tensor_parallel": 2}),
        ("tiny_qwen3", {}, {"processes": 4, "tensor_parallel": 2, "shard": True}),
    ],
)
def test_matrices_batches_and_weights_are_shared_together(
    model: str,
    changes: dict[str, Any],
    processes: dict[str, Any],
    request: pytest.FixtureRequest,
    write_rows: WriteRows,
    tmp_path: Path,
) -> None:
    options = replace(SHARED_MATRICES, epochs=2, **changes)
    how: dict[str, Any] = {"model": request.getfixturevalue(model), "write_rows": write_rows, "rows": 48}
    assert_learned_alike(
        run_films(tmp_path / "one", options, **how),
        run_films(tmp_path / "many", replace(options, **processes), **how),
    )


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "more"), [(2, []), (4, []), (4, ["--shard"])])
def test_processes_that_are_all_killed_go_on_to_the_same_bits(
    processes: int, more: list[str], tiny_encoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    """With dropout, whose state is in the checkpoints too."""
    train, dev = write_rows("train", film_rows(48)), write_rows("dev", film_rows(8))

    def command(output: Path) -> list[str]:
        return [
            *(sys.executable, "-m", "fastserve.cli.main", "tune", "text-classification", "--json"),
            *("--model", str(tiny_encoder), "--train", str(train), "--dev", str(dev)),
            *("--output", str(output), "--epochs", "4", "--batch-size", "8", "--learning-rate", "0.002"),
            *("--device", "cpu", "--eval-steps", "5", "--save-steps", "3", "--dropout", "0.2"),
            *("--on-problem", "split-overlap=keep", "--processes", str(processes)),
            *("--tensor-parallel", "2", *more),
        ]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), check=True, capture_output=True)
    process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = killed.with_name("killed.run")
    while not (run / "checkpoints" / "checkpoint-9").is_dir():  # being written: the one before is whole
        assert process.poll() is None
        time.sleep(0.001)
    for pid in [*descendants(process.pid), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert not killed.exists()
    again = subprocess.run([*command(killed), "--resume"], check=True, capture_output=True, text=True)
    assert json.loads(again.stdout)["resumed_at"] in (6, 9)
    left, right = load_file(whole / "model.safetensors"), load_file(killed / "model.safetensors")
    assert left.keys() == right.keys()
    assert all((left[name] == right[name]).all() for name in left)
