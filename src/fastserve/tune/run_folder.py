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
        self._check_same(json.loads(stored.read_text(encoding="utf-8")), request)
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
        for name in {**before, **request}:
            was, is_ = before.get(name), request.get(name)
            if isinstance(was, dict) and isinstance(is_, dict):
                self._check_same(was, is_)
            elif was != is_:
                raise OptionError(
                    f"{name}={is_!r} differs from {was!r}, which the unfinished run in {self.path} has",
                    hint="resume with what it began with, or remove its folder to start anew",
                    option=name,
                )


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
