"""What generation_config.json says of targets, and what it cannot say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastserve.checkpoint.generation import TargetRules, read_target_rules
from fastserve.errors import CheckpointError


def read(folder: Path, **settings: Any) -> TargetRules:
    (folder / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": 9, **settings}))
    return read_target_rules(folder, {}, vocab_size=10)


def test_tokens_that_no_target_has_are_bad_words_of_one_token_that_end_no_text(tmp_path: Path) -> None:
    rules = read(
        tmp_path,
        eos_token_id=0,
        bad_words_ids=[[9], [0], [1, 2], [3]],
        suppress_tokens=[4, 3],
        bos_token_id=5,
    )
    assert rules == TargetRules(start_token_id=9, suppressed_token_ids=(3, 4, 9))


@pytest.mark.parametrize(
    "settings",
    [
        {"bad_words_ids": 5},
        {"bad_words_ids": {"a": 1}},
        {"bad_words_ids": [[[1]]]},
        {"suppress_tokens": "1"},
        {"suppress_tokens": [10]},
        {"suppress_tokens": [[1]]},
        {"suppress_tokens": [None]},
        {"forced_eos_token_id": "1"},
        {"decoder_start_token_id": True},
    ],
)
def test_what_is_no_token_is_refused_by_name(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"token|bad_words_ids"):
        read(tmp_path, **settings)
