"""What is refused before anything is computed: no folder of a run is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastserve._native")
pytest.importorskip("transformers")

from fastserve.compress import CompressData, compress, compress_to_budget
from fastserve.errors import DataError, FastServeError, OptionError
from tune.conftest import tiny_encoder as tiny_encoder

WriteRows = Callable[[str, Iterable[Mapping[str, Any]]], Path]

CALIBRATED = "calibration: {sequences: 4, length: 64}\nsteps:\n  - wanda\n"
ROWS = [{"text": f"number {index}", "label": ("even", "odd")[index % 2]} for index in range(8)]


@pytest.fixture
def refused(
    tmp_path: Path, story_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., FastServeError]:
    """A function that compresses by a recipe's steps, and gives the error that came before any step."""

    def never(*_: Any) -> None:
        raise AssertionError("a step was run")

    monkeypatch.setattr("fastserve.compress.compress_run.CompressRun.follow", never)

    def refuse(model: Path, steps: str, **files: Any) -> FastServeError:
        recipe, output = tmp_path / "recipe.yaml", tmp_path / "out"
        recipe.write_text(f"{CALIBRATED}{steps}", encoding="utf-8")
        data = CompressData(**{"calibration": story_file, **files})
        with pytest.raises(FastServeError) as caught:
            compress(model, recipe=recipe, output=output, data=data)
        assert not output.with_name("out.run").exists()
        return caught.value

    return refuse


@pytest.mark.parametrize(
    ("steps", "option"),
    [
        ("  - structured: {neurons: 0.3, score: taylor}", "train"),
        ("  - recover", "train"),
        ("  - gradual", "train"),
        ("  - lottery", "train"),
        ("  - qat", "train"),
        ("  - distil", "train"),
    ],
)
def test_a_step_that_learns_needs_rows(
    refused: Callable[..., FastServeError], stories_folder: Path, steps: str, option: str
) -> None:
    error = refused(stories_folder, steps)
    assert isinstance(error, OptionError)
    assert error.option == option
    assert steps.split()[1].strip(":") in error.message
    assert "--train" in str(error.hint)


def test_several_students_need_dev_rows(
    refused: Callable[..., FastServeError], stories_folder: Path, story_file: Path
) -> None:
    error = refused(stories_folder, "  - distil: {students: [{share: 0.5}, {share: 0.2}]}", train=story_file)
    assert isinstance(error, OptionError)
    assert error.option == "dev"


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("  - wanda: {pattern: '3:7'}", "7 does not divide its 172 columns"),
        ("  - magnitude: {pattern: 7x1}", "blocks of 7 x 1"),
        ("  - sparsegpt: {targets: {include: absent}}", "no matrix"),
        ("  - rtn: {bits: 4, group_size: 64}", "172] cannot be quantized in groups of 64"),
        ("  - mixed: {group_size: 64, bits_per_weight: 5}", "172] cannot be quantized in groups of 64"),
        ("  - structured: {layers: 5}", "layers=5 is all that the model has"),
        ("  - gradual: {pattern: 7x1}", "blocks of 7 x 1"),
        ("  - distil: {layers: [7]}", "the model has 5"),
        ("  - distil: {config: {no_such_key: 1}}", "the model has no 'no_such_key'"),
        (
            "  - distil: {students: [{share: 0.5}, {share: 0.2}], most_parameters: 10}",
            "the smallest student has",
        ),
        ("  - rtn: {bits: 8}\n  - recover", "recover comes after rtn"),
        ("  - include: int8\n  - structured: {neurons: 0.5}", "structured comes after rtn"),
    ],
)
def test_what_does_not_fit_the_model_is_told_before_the_steps_before_it_run(
    refused: Callable[..., FastServeError], stories_folder: Path, story_file: Path, steps: str, said: str
) -> None:
    error = refused(stories_folder, steps, train=story_file, dev=story_file)
    assert isinstance(error, OptionError)
    assert said in error.message


def test_a_later_step_meets_the_shapes_that_an_earlier_one_leaves(
    tmp_path: Path, stories_folder: Path, story_file: Path, without_speed: None
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "calibration: {sequences: 2, length: 32}\nsteps:\n  - structured: {neurons: 0.2}\n"
        "  - rtn: {bits: 4, group_size: 32, targets: {include: down_proj}}\n",
        encoding="utf-8",
    )
    data = CompressData(calibration=story_file)
    result = compress(stories_folder, recipe=recipe, output=tmp_path / "out", data=data)
    assert any("int4" in layer["stored"] for layer in result.report["layers"])


def test_rows_and_the_task_are_looked_at_first(
    refused: Callable[..., FastServeError], tiny_encoder: Path, write_rows: WriteRows
) -> None:
    rows = write_rows("rows", ROWS)
    files = {"calibration": rows, "train": rows}
    assert "encoder of no task" in refused(tiny_encoder, "  - recover", **files).message
    files["task"] = "text-classification"
    broken = write_rows("broken", [{"text": "no label"}])
    assert isinstance(refused(tiny_encoder, "  - recover", **{**files, "train": broken}), DataError)
    behind_cuts = "  - structured: {neurons: 0.5}\n  - recover"
    assert isinstance(refused(tiny_encoder, behind_cuts, **{**files, "train": broken}), DataError)
    files["dev"] = write_rows("dev", [{**row, "text": f"another {row['text']}"} for row in ROWS])
    assert "rouge" in refused(tiny_encoder, "  - recover: {tune: {metric: rouge}}", **files).message


def test_a_teacher_must_have_learned_the_task(
    refused: Callable[..., FastServeError], tiny_encoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = write_rows("rows", ROWS)
    files = {"calibration": rows, "train": rows, "task": "text-classification"}
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_encoder, teacher)
    labels = {"0": "even", "1": "odd"}
    config = json.loads((teacher / "config.json").read_text("utf-8"))
    for head, task, names, said in (
        (
            "Token",
            "token-classification",
            labels,
            "has learned token-classification, not text-classification",
        ),
        ("Sequence", "text-classification", {"0": "even", "1": "uneven"}, "have other labels"),
    ):
        config["architectures"] = [f"BertFor{head}Classification"]
        changed = {**config, "id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
        (teacher / "config.json").write_text(json.dumps(changed), encoding="utf-8")
        settings = {"task": task, "labels": list(names.values())}
        (teacher / "fastserve.json").write_text(json.dumps(settings), encoding="utf-8")
        for step in ("distil", "qat: {distil: true, bits: 8}"):
            assert said in refused(teacher, f"  - {step}", **files).message
        assert (
            said in refused(tiny_encoder, f"  - recover: {{tune: {{teacher: {teacher}}}}}", **files).message
        )


def test_text_for_every_recipe_is_counted_before_the_first_is_followed(
    refused: Callable[..., FastServeError], stories_folder: Path, story_file: Path, tmp_path: Path
) -> None:
    hungry = tmp_path / "hungry.yaml"
    hungry.write_text("calibration: {sequences: 9999, length: 64}\nsteps: [wanda]\n", encoding="utf-8")
    data = CompressData(calibration=story_file, judged=story_file)
    with pytest.raises(DataError, match="too little text to calibrate"):
        compress_to_budget(
            stories_folder, recipes=["int8", hungry], output=tmp_path / "out", budget="size<=50%", data=data
        )
    assert not (tmp_path / "out.run").exists()
