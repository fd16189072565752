"""Recipes: lists of steps with options, by name or in a file, checked before anything is done.

A file (YAML, TOML, JSON) holds `steps`, each a step's name, or the name with its options, or another recipe
to include:

    calibration: {sequences: 128, length: 512}
    steps:
      - wanda: {sparsity: 0.5}
      - include: int8
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from fastserve.compress.option_value import read_options
from fastserve.compress.step import Step
from fastserve.errors import OptionError
from fastserve.option import check_integer
from fastserve.tune.options import read_mapping
from fastserve.types import JsonObject

# Where each step's class is: imported when a recipe names it.
STEPS: Mapping[str, str] = {
    "awq": "fastserve.compress.quantize.awq:Awq",
    "distil": "fastserve.compress.distil.step:Distil",
    "gptq": "fastserve.compress.quantize.step:Gptq",
    "gradual": "fastserve.compress.prune.gradual:Gradual",
    "lottery": "fastserve.compress.prune.lottery:Lottery",
    "magnitude": "fastserve.compress.prune.magnitude:Magnitude",
    "mixed": "fastserve.compress.quantize.mixed:Mixed",
    "qat": "fastserve.compress.quantize.qat:Qat",
    "recover": "fastserve.compress.prune.recover:Recover",
    "rtn": "fastserve.compress.quantize.step:Rtn",
    "smoothquant": "fastserve.compress.quantize.smoothquant:SmoothQuant",
    "sparsegpt": "fastserve.compress.prune.sparsegpt:SparseGpt",
    "structured": "fastserve.compress.prune.structured:Structured",
    "wanda": "fastserve.compress.prune.wanda:Wanda",
}

_QUANTIZE = ("awq", "gptq", "mixed", "qat", "rtn", "smoothquant")
_WANT_FLOATS = ("distil", "gradual", "lottery", "qat", "recover", "structured")

RECIPE_FOLDER = Path(__file__).parent / "recipes"

_SUFFIXES = (".yaml", ".yml", ".toml", ".json")
_KEYS = ("description", "calibration", "steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How much text steps are calibrated on: so many sequences of so many tokens."""

    sequences: int = 128
    length: int = 512

    def __post_init__(self) -> None:
        check_integer("sequences", self.sequences, low=1)
        check_integer("length", self.length, low=2)


@dataclass(frozen=True, slots=True)
class NamedStep:
    """A step and what recipes call it."""

    name: str
    step: Step

    def to_json(self) -> JsonObject:
        """As it stands in a recipe, with all its options."""
        return {self.name: asdict(self.step)}  # type: ignore[call-overload] # steps are dataclasses


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Steps in order, those of included recipes in their places.

    Raises:
        OptionError: a step that wants floats comes after one that quantizes.
    """

    name: str
    steps: tuple[NamedStep, ...]
    description: str = ""
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        for index, before in enumerate(self.steps):
            late = [named.name for named in self.steps[index + 1 :] if named.name in _WANT_FLOATS]
            if before.name in _QUANTIZE and late:
                raise OptionError(
                    f"recipe {self.name}: {late[0]} comes after {before.name}, which leaves whole numbers",
                    hint=f"put {late[0]} before the steps that quantize",
                    option="recipe",
                )

    @property
    def calibrates(self) -> bool:
        return any("calibration" in named.step.needs for named in self.steps)

    def to_json(self) -> JsonObject:
        """What `parse_recipe` reads again."""
        return {
            **({"description": self.description} if self.description else {}),
            "calibration": asdict(self.calibration),
            "steps": [named.to_json() for named in self.steps],
        }


def recipe_names() -> tuple[str, ...]:
    """Of the recipes that ship, sorted."""
    return tuple(sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml")))


def read_recipe(name_or_file: str | Path) -> Recipe:
    """The recipe of a name, or in a file.

    >>> read_recipe("int8").name
    'int8'

    Raises:
        OptionError: there is none, or something in it is unknown or out of range; the message says where.
    """
    return _read(str(name_or_file), Path(), ())


def parse_recipe(document: Mapping[str, Any], *, name: str, folder: Path | None = None) -> Recipe:
    """A recipe from what a file holds; files that it includes are sought in `folder`. Raises as
    `read_recipe`."""
    return _parse(document, name, folder or Path(), (name,))


def _read(name: str, folder: Path, including: tuple[str, ...]) -> Recipe:
    path = folder / Path(name).expanduser()
    if path.suffix not in _SUFFIXES:
        path = RECIPE_FOLDER / f"{name}.yaml"
        if not path.is_file():
            known = recipe_names()
            near = get_close_matches(name, known, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"recipes are {', '.join(known)}"
            raise OptionError(
                f"no recipe is named {name!r}{_within(including)}",
                hint=f"{hint}, or FILE.yaml",
                option="recipe",
            )
    if str(path) in including:
        chain = " includes ".join([*including, str(path)])
        raise OptionError(f"a recipe includes itself: {chain}", hint="take one out", option="recipe")
    document = read_mapping(path, option="recipe")
    is_shipped = path.parent == RECIPE_FOLDER
    return _parse(document, path.stem if is_shipped else str(path), path.parent, (*including, str(path)))


def _parse(document: Mapping[str, Any], name: str, folder: Path, including: tuple[str, ...]) -> Recipe:
    for key in document:
        if key not in _KEYS:
            raise OptionError(
                f"recipe {name}: {key!r} is no key", hint=f"keys are {', '.join(_KEYS)}", option="recipe"
            )
    entries = document.get("steps")
    if not isinstance(entries, list) or not entries:
        raise OptionError(
            f"recipe {name}: steps={entries!r} is no list of steps",
            hint=f"write `steps:` and lines such as `- {next(iter(STEPS), 'NAME')}`",
            option="recipe",
        )
    calibration = read_options(Calibration, document.get("calibration") or {}, f"recipe {name}: calibration")
    description = document.get("description", "")
    return Recipe(
        name=name,
        steps=tuple(
            step
            for index, entry in enumerate(entries, start=1)
            for step in _steps_of(entry, f"recipe {name}, step {index}", folder, including)
        ),
        description=str(description),
        calibration=calibration,
    )


def _steps_of(entry: Any, where: str, folder: Path, including: tuple[str, ...]) -> Iterator[NamedStep]:
    if isinstance(entry, str):
        entry = {entry: None}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise OptionError(
            f"{where}: {entry!r} is no step", hint="write NAME, or NAME: {OPTION: VALUE}", option="recipe"
        )
    ((name, options),) = entry.items()
    if name == "include":
        yield from _read(str(options), folder, including).steps
        return
    yield NamedStep(str(name), make_step(str(name), options or {}, where))


def make_step(name: str, options: Mapping[str, Any], where: str) -> Step:
    """A step by its name in recipes. `where` begins messages.

    Raises:
        OptionError: the step or an option is unknown, or a value is not what it may be.
    """
    if name not in STEPS:
        near = get_close_matches(name, STEPS, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"steps are {', '.join(sorted(STEPS))}"
        raise OptionError(f"{where}: no step is named {name!r}", hint=hint, option="recipe")
    module, _, attribute = STEPS[name].partition(":")
    step: Step = read_options(getattr(import_module(module), attribute), options, f"{where} ({name})")
    return step


def _within(including: tuple[str, ...]) -> str:
    return f", which {including[-1]} includes" if including else ""
