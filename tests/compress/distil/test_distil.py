"""Students: which layers they keep, what is drawn anew, and that they learn from the source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.working_models import all_values, make_context, open_working_model, working_model
from fastserve.compress.distil.step import Distil
from fastserve.compress.distil.student import StudentOptions, make_student
from fastserve.compress.recipe import read_recipe
from fastserve.compress.step import Context
from fastserve.errors import DataError, OptionError
from fastserve.tune import TuneOptions, tune
from tiny_models import LLAMA_CONFIG
from tune.conftest import film_rows, tiny_encoder, write_rows

__all__ = ["tiny_encoder", "write_rows"]

WriteRows = Callable[[str, list[dict[str, Any]]], Path]
TUNE = {"epochs": 4, "batch_size": 8, "learning_rate": 5e-3, "device": "cpu", "max_length": 32}


@pytest.fixture
def taught(tiny_encoder: Path, write_rows: WriteRows, tmp_path: Path) -> tuple[Path, Context]:
    """A classifier, and what steps may use to make a smaller one of it."""
    train, dev = write_rows("train", film_rows(40)), write_rows("dev", film_rows(60)[40:])
    result = tune(
        "text-classification",
        model=str(tiny_encoder),
        train=train,
        output=tmp_path / "source",
        options=TuneOptions(**TUNE),
    )
    on_problem = {"on_problem": {"split-overlap": "keep"}}
    context = make_context(tmp_path, task="text-classification", train=train, dev=dev)
    TUNE_IN_RECIPE.update(TUNE, **on_problem)
    return result.path, context


TUNE_IN_RECIPE: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("share", "kept"), [(0.5, (1, 3)), (0.25, (3,)), (0.75, (1, 2, 3)), (1.0, (0, 1, 2, 3))]
)
def test_a_share_of_layers_is_spread_and_keeps_the_last(share: float, kept: tuple[int, ...]) -> None:
    model = working_model({**LLAMA_CONFIG, "num_hidden_layers": 4})
    student = make_student(model, StudentOptions(share=share), seed=0)
    assert student.layer_map == kept
    assert student.model.config["num_hidden_layers"] == len(kept)
    own, first = all_values(student.model), all_values(model)
    name = "self_attn.q_proj.weight"
    np.testing.assert_array_equal(own[f"model.layers.0.{name}"], first[f"model.layers.{kept[0]}.{name}"])


def test_matrices_of_another_shape_are_drawn_and_the_others_stay() -> None:
    model = working_model(LLAMA_CONFIG)
    width = model.config["intermediate_size"] // 2
    student = make_student(model, StudentOptions(config={"intermediate_size": width}), seed=0).model
    before, after = all_values(model), all_values(student)
    changed = {name for name in before if before[name].shape != after[name].shape}
    assert changed == {name for name in before if ".mlp." in name}
    assert all((before[name] == after[name]).all() for name in before.keys() - changed)
    again = all_values(make_student(model, StudentOptions(config={"intermediate_size": width}), seed=0).model)
    assert all((after[name] == again[name]).all() for name in changed)
    with pytest.raises(OptionError, match="the model has no 'depth'"):
        make_student(model, StudentOptions(config={"depth": 3}), seed=0)


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 1), ("vocab_size", 50)])
def test_a_config_does_not_say_how_many_layers_or_tokens_a_student_has(key: str, value: int) -> None:
    with pytest.raises(OptionError, match=f"config: {key} is not to be changed"):
        make_student(working_model(LLAMA_CONFIG), StudentOptions(config={key: value}), seed=0)


def test_a_student_of_half_the_layers_learns_from_the_source(taught: tuple[Path, Context]) -> None:
    source, context = taught
    assert source == context.source
    step = Distil(share=0.5, tune={**TUNE_IN_RECIPE, "hidden_weight": 0.1, "soft_weight": 0.8})
    student = step.run(open_working_model(source), context)
    assert student.config["num_hidden_layers"] == 1
    assert student.checkpoint.card["lineage"]["options"]["layer_map"] == [1]
    assert student.checkpoint.card["metrics"]["accuracy"] > 0.9
    assert context.notes[0].startswith("distil: a student of 1 layers and ")


def test_of_several_students_the_best_that_is_small_enough_is_taught(taught: tuple[Path, Context]) -> None:
    source, context = taught
    model = open_working_model(source)
    whole = make_student(model, StudentOptions(), seed=0).num_parameters
    step = Distil(
        students=(StudentOptions(), StudentOptions(layers=(0,)), StudentOptions(layers=(1,))),
        most_parameters=whole - 1,
        search_steps=4,
        tune=TUNE_IN_RECIPE,
    )
    student = step.run(model, context)
    assert student.config["num_hidden_layers"] == 1
    assert "2 students after 4 steps" in context.notes[0]
    with pytest.raises(OptionError, match="most_parameters=1: the smallest student has"):
        Distil(students=step.students, most_parameters=1, tune=TUNE_IN_RECIPE).run(model, context)
    context.dev = None
    with pytest.raises(DataError, match="chosen by dev rows"):
        step.run(model, context)


def test_a_recipe_with_a_teacher_s_options_is_checked_before_anything_runs() -> None:
    assert read_recipe("distill-half").steps[0].name == "distil"
    with pytest.raises(OptionError, match="students are named twice"):
        Distil(share=0.5, students=(StudentOptions(),))
    with pytest.raises(OptionError, match="soft_weight=2"):
        Distil(tune={"soft_weight": 2})
    with pytest.raises(OptionError, match="share and layers say the same"):
        Distil(share=0.5, layers=(0,))
