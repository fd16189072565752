"""A run goes on with what it began with, and says where it is asked for something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastserve.errors import OptionError
from fastserve.tune.run_folder import RunFolder

REQUEST: dict[str, Any] = {
    "model": "m",
    "recipes": [{"description": "x" * 200, "steps": [{"mixed": {"choices": (2, 4), "seed": None}}]}],
    "data": {"train": "aa"},
}


def test_tuples_of_a_request_are_those_that_were_stored(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    folder.begin(REQUEST, resume=False)
    assert folder.begin(REQUEST, resume=True) is None


@pytest.mark.parametrize(
    ("changed", "place", "option"),
    [
        (
            {"recipes": [{**REQUEST["recipes"][0], "steps": [{"mixed": {"choices": (2, 8), "seed": None}}]}]},
            r"recipes\[0\]\.steps\[0\]\.mixed\.choices\[1\]=8 differs from 4,",
            "choices",
        ),
        ({"data": {"train": "aa", "dev": "bb"}}, "data.dev='bb' differs from None,", "dev"),
        ({"recipes": []}, r"recipes=\[\] differs from \[\{'description': 'x+\.\.\., ", "recipes"),
    ],
)
def test_what_differs_is_named_by_its_place_and_shown_in_short(
    tmp_path: Path, changed: dict[str, Any], place: str, option: str
) -> None:
    folder = RunFolder(tmp_path / "out")
    folder.begin(REQUEST, resume=False)
    with pytest.raises(OptionError, match=place) as caught:
        folder.begin({**REQUEST, **changed}, resume=True)
    assert caught.value.option == option
