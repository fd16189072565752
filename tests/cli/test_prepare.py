from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastserve.cli.main import main


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.csv"
    texts = [
        f"{at},This is number {at} and {'good' if at % 2 else 'bad'},{'pos' if at % 2 else 'neg'}"
        for at in range(40)
    ]
    path.write_text("\n".join(["id,review,sentiment", *texts, texts[3].replace("3,", "99,", 1)]) + "\n")
    return path


def test_the_document_tells_splits_problems_and_files(
    reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["prepare", str(reviews), "--task", "text-classification", "--output", str(output), "--json"]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["output"] == str(output)
    assert {name: split["rows"] for name, split in document["splits"].items()} == {
        "train": 32,
        "dev": 4,
        "test": 4,
    }
    assert document["problems"] == {"duplicate": {"drop": 1}}
    assert document["options"]["stratify"] is True
    for name in document["outputs"]:
        assert (output / name).exists()


def test_a_person_reads_a_few_lines(
    reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(["prepare", str(reviews), "--task", "text-classification", "--output", str(output)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"wrote {output}: train 32, dev 4, test 4 rows"
    assert out[1] == "  duplicate: drop 1"
    assert "field 'review' is read as 'text'" in out[2]


def test_a_fatal_problem_is_one_line_with_file_line_and_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n{"text": "b"}\n')
    arguments = ["prepare", str(path), "--task", "text-classification", "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"{path}:2: no field 'label', which text-classification needs" in error
    assert "--on-problem missing-field=drop" in error
    assert error.count("\n") == 1
    assert (
        main([*arguments, "--on-problem", "missing-field=drop", "--dev-ratio", "0", "--test-ratio", "0"]) == 0
    )
    assert rows(tmp_path / "out" / "train.jsonl") == [{"text": "a", "label": "x"}]


def test_files_have_their_labels_and_named_columns(tmp_path: Path) -> None:
    for name in ("pos", "neg"):
        (tmp_path / name).write_text(f"one {name} text\ntwo {name} texts\n")
    arguments = ["prepare", str(tmp_path / "pos"), str(tmp_path / "neg"), "--format", "text"]
    arguments += [
        "--file-labels",
        "good,bad",
        "--task",
        "text-classification",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, "--dev-ratio", "0", "--test-ratio", "0"]) == 0
    assert [row["label"] for row in rows(tmp_path / "out" / "train.jsonl")] == ["good", "good", "bad", "bad"]


def test_parallel_files_come_in_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (
        ("a.en", "one\ntwo\n"),
        ("a.de", "eins\nzwei\n"),
        ("b.en", "three\n"),
        ("b.de", "drei\n"),
    ):
        (tmp_path / name).write_text(text)
    files = [str(tmp_path / name) for name in ("a.en", "a.de")]
    arguments = [
        "prepare",
        *files,
        "--format",
        "parallel",
        "--task",
        "translation",
        "--output",
        str(tmp_path / "out"),
    ]
    dev = ["--dev", str(tmp_path / "b.en"), "--dev", str(tmp_path / "b.de"), "--test-ratio", "0"]
    assert main([*arguments, *dev]) == 0
    assert rows(tmp_path / "out" / "train.jsonl")[1] == {"source": "two", "target": "zwei"}
    assert rows(tmp_path / "out" / "dev.jsonl") == [{"source": "three", "target": "drei"}]
    assert main([*arguments, "--dev", str(tmp_path / "b.en")]) == 2
    assert "1 files of parallel text are no pairs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--on-problem", "bom=ignore"], "on_problem='ignore' is unknown"),
        (["--on-problem", "bom"], "'bom' is not of the form KIND=ACTION"),
        (["--dev", "{path}", "--dev-ratio", "0.2"], "both say what dev is"),
        (["--noise-ratio", "0.2"], "say how many variants to add: --augment 1"),
        (["--file-labels", "a,b"], "file_labels names 2 labels for 1 files"),
        (["--mask-pii", "name"], "mask_pii='name' is unknown"),
        (["--memory", "tiny"], "memory='tiny' is not a size"),
        (["--labels", "pos"], "label 'neg' is none of those named"),
    ],
)
def test_options_that_cannot_be_are_refused(
    reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    arguments = ["prepare", str(reviews), "--task", "text-classification", "--output", str(tmp_path / "out")]
    assert main([*arguments, *(option.format(path=reviews) for option in options)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_lists_every_kind_of_problem(capsys: pytest.CaptureFixture[str]) -> None:
    from fastserve.data import PROBLEM_KINDS

    assert main(["prepare", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"{kind}:" in text for kind in PROBLEM_KINDS)
