"""Recipes: what they become, and what their errors say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from fastserve.compress import recipe as recipe_module
from fastserve.compress.recipe import STEPS, parse_recipe, read_recipe, recipe_names
from fastserve.compress.step import Context, Need, Targets, WorkingModel
from fastserve.errors import OptionError
from fastserve.option import check_integer


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """A step with an option of every type."""

    bits: int = 8
    share: float = 0.5
    kind: Literal["row", "group"] = "row"
    sizes: tuple[int, ...] = ()
    is_final: bool = False
    limit: int | None = None
    targets: Targets = Targets()  # noqa: RUF009 - frozen

    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})

    def __post_init__(self) -> None:
        check_integer("bits", self.bits, low=2, high=8)

    def run(self, model: WorkingModel, context: Context) -> WorkingModel:
        return model


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """A step without options."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    def run(self, model: WorkingModel, context: Context) -> WorkingModel:
        return model


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_module, "STEPS", {"fold": f"{__name__}:Fold", "rest": f"{__name__}:Rest"})


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_becomes_steps_with_their_options(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "own.yaml",
        """
description: in two steps
calibration: {sequences: 4, length: 16}
steps:
  - rest
  - fold:
      bits: 4
      share: 1e-2
      sizes: [1, 2]
      limit: null
      kind: group
      targets: {tables: true, include: "mlp"}
""",
    )
    recipe = read_recipe(path)
    assert recipe.calibrates
    assert recipe.calibration.sequences == 4
    assert [named.name for named in recipe.steps] == ["rest", "fold"]
    assert recipe.steps[1].step == Fold(
        bits=4, share=0.01, sizes=(1, 2), kind="group", targets=Targets(tables=True, include="mlp")
    )
    stored = json.loads(json.dumps(recipe.to_json()))
    assert parse_recipe(stored, name=recipe.name) == recipe


def test_recipes_include_others_in_their_places(tmp_path: Path) -> None:
    write(tmp_path, "inner.yaml", "steps: [rest, {fold: {bits: 3}}]")
    outer = write(tmp_path, "outer.yaml", "steps: [fold, include: inner.yaml, rest]")
    recipe = read_recipe(outer)
    assert [named.name for named in recipe.steps] == ["fold", "rest", "fold", "rest"]
    assert recipe.steps[2].step == Fold(bits=3)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("steps: [fodl]", "step 1: no step is named 'fodl'", "did you mean fold?"),
        ("steps: [zzz]", "no step is named 'zzz'", "steps are fold, rest"),
        (
            "steps: [rest, {fold: {bit: 4}}]",
            r"step 2 \(fold\): no option is named 'bit'",
            "did you mean bits?",
        ),
        ("steps: [{rest: {bits: 4}}]", "no option is named 'bits'", "it has no options"),
        ("steps: [{fold: {bits: four}}]", "bits='four' is not a whole number", "give a whole number"),
        ("steps: [{fold: {bits: 4.5}}]", "bits=4.5 is not a whole number", "give"),
        ("steps: [{fold: {bits: 9}}]", r"step 1 \(fold\): bits=9 is out of range", "at most 8"),
        ("steps: [{fold: {share: much}}]", "share='much' is not a number", "give a number"),
        ("steps: [{fold: {kind: yes}}]", "kind=True is not one of row, group", "quoted"),
        ("steps: [{fold: {is_final: 1}}]", "is_final=1 is not true or false", "give"),
        ("steps: [{fold: {sizes: [1, x]}}]", r"sizes\[1\]='x' is not a whole number", "give"),
        ("steps: [{fold: {sizes: 3}}]", "sizes=3 is not a list", "give"),
        ("steps: [{fold: {targets: {table: true}}}]", "targets: no option is named 'table'", "tables"),
        ("steps: [{fold: {targets: {include: '('}}}]", r"targets: include='\(' is no regular", "escape"),
        ("steps: [{fold: {targets: {exclude: '*'}}}]", r"targets: exclude='\*' is no regular", "escape"),
        ("steps: [{fold: {}, rest: {}}]", "is no step", "NAME: {OPTION: VALUE}"),
        ("steps: []", r"steps=\[\] is no list of steps", "fold"),
        ("step: [rest]", "'step' is no key", "keys are description, calibration, steps"),
        ("calibration: {length: 1}\nsteps: [rest]", "calibration: length=1 is out of range", "at least 2"),
        ("steps: [include: none]", "no recipe is named 'none', which .*own.yaml includes", "FILE.yaml"),
        ("steps: [include: own.yaml]", "includes itself", "take one out"),
        ("steps: [", "is broken", "mend it"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, text: str, message: str, hint: str) -> None:
    path = write(tmp_path, "own.yaml", text)
    with pytest.raises(OptionError, match=message) as caught:
        read_recipe(path)
    assert hint in (caught.value.hint or "")


def test_a_missing_file_and_an_unknown_name_are_said(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no file is at"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(OptionError, match="no recipe is named 'int9'"):
        read_recipe("int9")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_that_ships_can_be_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_module, "STEPS", STEPS)
    recipe = read_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert parse_recipe(json.loads(json.dumps(recipe.to_json())), name=name) == recipe
