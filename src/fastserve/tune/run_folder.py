"""The folder of a run while it lasts, `OUTPUT.run`: what was asked for, checkpoints, and the best weights.

It is gone when the model directory is there, which appears whole, by one rename.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from fastserve.errors import OptionError
from fastserve.types import JsonObject

_MOST_SHOWN = 60  # characters of a value in a message
_STATE_FILE = "trainer_state.json"  # the last file of a checkpoint that is written


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where a run that makes `output` keeps its state."""

    output: Path

    @property
    def path(self) -> Path:
        return self.output.with_name(f"{self.output.name}.run")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def plots(self) -> Path:
        return self.path / "training"

    def begin(self, request: JsonObject, *, resume: bool) -> Path | None:
        """Make the folder, or find it again. Returns the checkpoint to go on from, if there is one.

        Raises:
            OptionError: the output is there already; an unfinished run is, and `resume` is not said; or it is
                of another request, whose first difference is named.
        """
        if self.output.exists():
            raise OptionError(
                f"output: {self.output} is there already",
                hint="the run that made it has ended; name another folder, or remove it",
                option="output",
            )
        stored = self.path / "run.json"
        if not stored.is_file():
            self.path.mkdir(parents=True, exist_ok=True)
            written = self.path / "run.json.part"
            written.write_text(json.dumps(request, indent=2), encoding="utf-8")
            os.replace(written, stored)
            return None
        if not resume:
            raise OptionError(
                f"output: an unfinished run is in {self.path}",
                hint="--resume goes on with it; remove the folder to start anew",
                option="output",
            )
        as_stored = json.loads(json.dumps(request))  # tuples are lists there
        self._check_same(json.loads(stored.read_text(encoding="utf-8")), as_stored)
        return self.last_checkpoint()

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole; what a killed process left half-written is removed."""
        by_step = sorted(
            self.checkpoints.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])
        )
        for path in by_step:
            if _is_whole(path):
                return path
            shutil.rmtree(path)
        return None

    def finish(self, *, keep: bool) -> None:
        """Remove what the run has left."""
        if not keep:
            shutil.rmtree(self.path)

    def _check_same(self, before: JsonObject, request: JsonObject) -> None:
        found = _first_difference(before, request, "")
        if found is not None:
            raise OptionError(
                f"{found.place}={found.is_} differs from {found.was}, which the unfinished run in {self.path}"
                " has",
                hint="resume with what it began with, or remove its folder to start anew",
                option=found.option,
            )


@dataclass(frozen=True, slots=True)
class _Difference:
    """Where two requests differ: `recipes[0].steps[1].rtn.bits`, whose last name is the option's."""

    place: str
    was: str
    is_: str

    @property
    def option(self) -> str:
        return self.place.rpartition(".")[2].partition("[")[0]


def _first_difference(was: object, is_: object, place: str) -> _Difference | None:
    if isinstance(was, dict) and isinstance(is_, dict):
        pairs = [(f"{place}.{name}" if place else name, name) for name in {**was, **is_}]
        found = (_first_difference(was.get(name), is_.get(name), inner) for inner, name in pairs)
        return next((each for each in found if each is not None), None)
    if isinstance(was, list) and isinstance(is_, list) and len(was) == len(is_):
        several = enumerate(zip(was, is_, strict=True))
        found = (_first_difference(*both, f"{place}[{index}]") for index, both in several)
        return next((each for each in found if each is not None), None)
    return None if was == is_ else _Difference(place, _shown(was), _shown(is_))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
