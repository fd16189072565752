"""A teacher in two processes says what it says in one; what is finished stays when one of them is killed."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastserve.errors import OptionError, StepError
from fastserve.evaluate.task.generation import Generation
from fastserve.evaluate.task.task import Task
from fastserve.evaluate.task.text_classification import TextClassification
from fastserve.evaluate.task.token_classification import TokenClassification
from fastserve.tune import TuneOptions, logit_cache, teacher_processes, tune
from fastserve.tune.logit_cache import Parts, keep_logits
from fastserve.tune.source_model import SourceModel, load_model, open_source_model
from fastserve.tune.teacher_processes import TeacherProcesses
from tune.conftest import city_rows, film_rows, tune_to_films

WriteRows = Callable[[str, list[dict[str, Any]]], Path]
OPTIONS = TuneOptions(epochs=1, batch_size=8, learning_rate=5e-3, device="cpu", max_length=32, dropout=0.0)
CLASSES = TextClassification(labels=("n", "y"), max_length=32, problem="single-label")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """As each process of the teacher has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_cache, "_EXAMPLES_OF_A_PART", 8)


@pytest.fixture(scope="module")
def teacher(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tune_to_films(tiny_encoder, tmp_path_factory.mktemp("teacher"), OPTIONS, num_rows=16)


def several(num: int, source: SourceModel, task: Task, features: Any) -> TeacherProcesses:
    return TeacherProcesses(num, source.spec, task, features, source.tokenizer.pad_token_id)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokens", "text"])
def test_two_processes_write_the_files_of_one_bit_for_bit(
    tiny_encoder: Path, tiny_decoder: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "tokens":
        path, rows = tiny_encoder, city_rows(30)
        task: Task = TokenClassification(labels=("O", "B-PER", "B-LOC"), max_length=32, stride=0)
    else:
        path, rows = tiny_decoder, [{"text": row["text"]} for row in film_rows(30)]
        task = Generation(name="causal-lm", max_length=32)
    source = open_source_model(str(path), path)
    features = task.encode(rows, source.tokenizer, with_labels=True).features
    saved = tmp_path / "saved"  # with a head, which both are to have
    torch.manual_seed(0)
    load_model(source, task, dropout=None).save_pretrained(saved)
    source.tokenizer.save_pretrained(saved)
    source = open_source_model(str(saved), saved)
    model = load_model(source, task, dropout=None).eval()
    pad = source.tokenizer.pad_token_id
    one = keep_logits(model, features, tmp_path / "1", pad_token_id=pad)
    two = keep_logits(
        model, features, tmp_path / "2", pad_token_id=pad, compute=several(2, source, task, features)
    )
    assert one is not None
    assert two is not None
    assert sorted(path.suffix for path in (tmp_path / "1").iterdir()) == [".f32", ".json"]
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")
    np.testing.assert_array_equal(one.batch([29, 3], num_tokens=16), two.batch([29, 3], num_tokens=16))


def test_a_killed_process_is_told_and_what_is_finished_is_kept_for_the_next_run(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source_model(str(teacher), teacher)
    features = CLASSES.encode(film_rows(24), source.tokenizer, with_labels=True).features
    model, pad = load_model(source, CLASSES, dropout=None).eval(), source.tokenizer.pad_token_id
    start, computed = teacher_processes.start_process, []

    def compute(parts: Parts, missing: Any) -> None:
        computed.append(list(missing))
        first = parts.path(missing[0])
        if first.name.startswith("000000"):  # the first run: one part is finished before the processes are
            logit_cache.write_part(model, features[parts.examples(0)], first, pad)
            several(2, source, CLASSES, features)(parts, missing[1:])
        else:
            for number in missing:
                logit_cache.write_part(model, features[parts.examples(number)], parts.path(number), pad)

    def start_and_kill(request: Path, errors: int) -> subprocess.Popen[bytes]:
        process = start(request, errors)
        process.kill()
        return process

    monkeypatch.setattr(teacher_processes, "start_process", start_and_kill)
    with pytest.raises(StepError, match=r"was killed by signal 9; 1 of 3 parts of its outputs are computed"):
        keep_logits(model, features, tmp_path / "2", pad_token_id=pad, compute=compute)
    assert [path.name for path in (tmp_path / "2").rglob("*.npz")] == ["000000.npz"]
    keep_logits(model, features, tmp_path / "2", pad_token_id=pad, compute=compute)
    assert computed == [[0, 1, 2], [1, 2]]
    keep_logits(model, features, tmp_path / "1", pad_token_id=pad)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_what_a_process_says_before_it_fails_is_told(teacher: Path, tmp_path: Path) -> None:
    source = open_source_model(str(teacher), teacher)
    features = CLASSES.encode(film_rows(12), source.tokenizer, with_labels=True).features
    (tmp_path / "parts").mkdir()
    gone = replace(several(1, source, CLASSES, features), spec=str(tmp_path / "gone"))
    with pytest.raises(StepError, match=r"ended with code 1: .*gone.*0 of 2 parts") as caught:
        gone(Parts(tmp_path / "parts", 12), [0, 1])
    assert "resume the run" in str(caught.value)


@pytest.mark.slow
def test_a_student_taught_by_two_processes_is_that_of_one_and_a_run_goes_on_with_another_number(
    tiny_encoder: Path, teacher: Path, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = write_rows("train", film_rows(24))
    options = replace(OPTIONS, teacher=str(teacher))

    def run(name: str, number: int, **more: Any) -> bytes:
        result = tune(
            "text-classification",
            model=str(tiny_encoder),
            train=train,
            output=tmp_path / name,
            options=replace(options, teacher_processes=number),
            **more,
        )
        return (result.path / "model.safetensors").read_bytes()

    one = run("one", 1)
    with monkeypatch.context() as patched:
        patched.setattr(TeacherProcesses, "_wait", lambda *_: (_ for _ in ()).throw(StepError("killed")))
        with pytest.raises(StepError):
            run("two", 3)
    assert run("two", 2, resume=True) == one


def test_processes_for_what_is_not_kept_are_refused(teacher: Path, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(OptionError, match="teacher_processes is for learning from a teacher"):
        TuneOptions(teacher_processes=2)
    with pytest.raises(OptionError, match="teacher_processes is not for hidden states and attention maps"):
        TuneOptions(teacher="t", hidden_weight=1.0, teacher_processes=2)
    with pytest.raises(OptionError, match="teacher_processes=0"):
        TuneOptions(teacher="t", teacher_processes=0)
    monkeypatch.setattr(logit_cache, "_MOST_CACHED_BYTES", 16)
    source = open_source_model(str(teacher), teacher)
    features = CLASSES.encode(film_rows(12), source.tokenizer, with_labels=True).features
    model, pad = load_model(source, CLASSES, dropout=None).eval(), source.tokenizer.pad_token_id
    assert keep_logits(model, features, tmp_path, pad_token_id=pad) is None
    with pytest.raises(OptionError, match="GiB are not kept on the disk"):
        keep_logits(
            model, features, tmp_path, pad_token_id=pad, compute=several(2, source, CLASSES, features)
        )
