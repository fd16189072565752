"""A search under a budget: what is measured, what is chosen, and what is said where nothing keeps it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("fastserve._native")
pytest.importorskip("transformers")

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.conversion import describe
from fastserve.cli.main import main
from fastserve.compress import CompressData, compress_to_budget
from fastserve.compress.group import find_groups
from fastserve.compress.step import WorkingModel
from fastserve.errors import OptionError

pytestmark = pytest.mark.usefixtures("without_speed")


def test_groups_hold_every_matrix_once(stories_folder: Path) -> None:
    model = WorkingModel(checkpoint=open_checkpoint(stories_folder))
    groups = find_groups(model)
    names = [name for group in groups for name in group.matrices]
    assert len(names) == len(set(names)) == 5 * 7 + 1
    by_name = {group.name: group.matrices for group in groups}
    assert by_name["tables"] == ("model.embed_tokens.weight",)
    assert len(by_name["early attention"]) == 4 * 2
    assert len(by_name["late feed-forward"]) == 3


def test_the_best_that_keeps_the_budget_is_chosen_and_is_what_it_says(
    stories_folder: Path, story_file: Path, tmp_path: Path
) -> None:
    result = compress_to_budget(
        stories_folder,
        output=tmp_path / "out",
        budget="size<=24% quality>=-20%",
        data=CompressData(judged=story_file),
        trials=2,
        limit=1,
    )
    trials = {trial["name"]: trial for trial in result.report["search"]}
    assert {"int8-all", "int4-rtn", "mix-1", "mix-2"} == set(trials)
    (chosen,) = [trial for trial in trials.values() if trial["is_chosen"]]
    assert result.path is not None
    assert chosen["is_met"]
    met = [trial for trial in trials.values() if trial["is_met"]]
    assert chosen["quality"] == max(trial["quality"] for trial in met)
    assert result.report["size"]["share"] <= 0.24
    files = (result.path / "compression").iterdir()
    assert {"front.png", "front.html", "report.html", "report.json"} == {path.name for path in files}
    if chosen["groups"]:
        stored = open_checkpoint(result.path).tensors
        groups = {
            group.name: group
            for group in find_groups(WorkingModel(checkpoint=open_checkpoint(stories_folder)))
        }
        kinds = {"int8-all": "int8 in rows", "int4-rtn": "int4 in rows", "as it is": "f32"}
        for group, recipe in chosen["groups"].items():
            if group != "tables":
                name = groups[group].matrices[0]
                assert describe(stored[name]).startswith(kinds[recipe][:4].strip())


def test_where_nothing_keeps_the_budget_the_best_is_told_and_refused(
    stories_folder: Path, story_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = ["compress", str(stories_folder), "--output", str(output), "--data", str(story_file)]
    command += ["--trials", "0", "--limit", "1", "--budget", "size<=1kB"]
    assert main([*command, "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    sizes = {trial["name"]: trial["size"] for trial in document["search"]}
    (chosen,) = [trial["name"] for trial in document["search"] if trial["is_chosen"]]
    assert sizes[chosen] == min(sizes.values())
    assert not document["budget"]["is_met"]
    assert not output.exists()
    assert main([*command, "--resume", "--accept"]) == 0
    assert "NOT met: size<=1kB" in capsys.readouterr().out
    assert open_checkpoint(output).card["lineage"]["recipe"]["name"] == chosen


def test_a_search_needs_something_to_judge_by_and_recipes_of_different_names(
    stories_folder: Path, story_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="give such a file with --data"):
        compress_to_budget(stories_folder, output=tmp_path / "out", budget="size<=1MB", data=CompressData())
    with pytest.raises(OptionError, match="two are called int8"):
        compress_to_budget(
            stories_folder,
            output=tmp_path / "out",
            budget="size<=1MB",
            data=CompressData(judged=story_file),
            recipes=["int8", "int8"],
        )
    assert main(["compress", str(stories_folder), "--output", str(tmp_path / "out")]) == 2
