"""What loading a model comes to is known before its weights are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fastserve.config import EngineOptions
from fastserve.engine.load import load_model, plan_model
from fastserve.errors import UnsupportedError

pytest.importorskip("fastserve._native")

OPTIONS = EngineOptions(threads=1, context_length=256)
MIB = 2**20


@pytest.mark.parametrize(
    "options",
    [
        replace(OPTIONS, kv_memory="1MiB"),
        replace(OPTIONS, weights="f32", kv_memory="2MiB"),
        replace(OPTIONS, kv_memory="1MiB", speculation="draft", draft_layers=2),
    ],
    ids=["int8", "f32", "draft"],
)
def test_a_plan_is_what_loading_comes_to(stories: Path, options: EngineOptions) -> None:
    plan, model = plan_model(stories, options), load_model(stories, options)
    draft_bytes = model.draft.footprint.total_bytes if model.draft else 0
    assert plan.total_bytes == model.footprint.total_bytes + draft_bytes
    assert (plan.kv_bytes, plan.context_length) == (model.footprint.kv_bytes, model.context_length)
    assert plan.task == "generate"


def test_memory_for_keys_and_values_that_is_left_open_is_a_part_of_what_is_available(stories: Path) -> None:
    few, more = (plan_model(stories, OPTIONS, available_bytes=mib * MIB) for mib in (70, 72))
    assert few.total_bytes < 70 * MIB
    assert few.total_bytes < more.total_bytes < 72 * MIB
    assert few.kv_bytes < more.kv_bytes
    kept = plan_model(stories, replace(OPTIONS, kv_memory=few.kv_bytes), available_bytes=2**40)
    assert kept == few


def test_a_plan_of_an_encoder_says_so_and_of_what_cannot_be_loaded_why(
    model_dir: Callable[[str], Path],
) -> None:
    path, options = model_dir("all-minilm-l6-v2"), EngineOptions(threads=1)
    plan = plan_model(path, options)
    assert plan.task == "embed"
    kept = replace(options, kv_memory=plan.kv_bytes)
    assert plan.total_bytes == load_model(path, kept).footprint.total_bytes
    with pytest.raises(UnsupportedError, match="'minilm' is an encoder"):
        plan_model(path, EngineOptions(speculation="draft", draft_layers=1), name="minilm")


class GivenUpError(Exception):
    pass


@pytest.mark.parametrize(
    "options",
    [
        replace(OPTIONS, kv_memory="1MiB"),
        replace(OPTIONS, kv_memory="1MiB", speculation="draft", draft_layers=2),
    ],
    ids=["alone", "draft"],
)
def test_a_load_can_be_given_up_at_every_matrix_of_a_model_and_its_draft(stories, options) -> None:
    num_checks = 0

    def count() -> None:
        nonlocal num_checks
        num_checks += 1

    load_model(stories, options, check=count)
    total = num_checks
    assert total >= 20 + (8 if options.speculation == "draft" else 0)

    def give_up() -> None:
        count()
        if num_checks == last:
            raise GivenUpError

    for last in (1, total // 2, total):
        num_checks = 0
        with pytest.raises(GivenUpError):
            load_model(stories, options, check=give_up)
        assert num_checks == last
