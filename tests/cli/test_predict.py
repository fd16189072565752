from __future__ import annotations

import json
from pathlib import Path

import pytest

import fastserve
from fastserve.cli.main import main
from tiny_heads import save_bert_head

pytest.importorskip("fastserve._native")

TEXTS = ["the cat sat.", "Ada Lovelace was born in London"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("heads")
    sequence, tags = "ForSequenceClassification", ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    several = {"labels": ("a", "b"), "problem_type": "multi_label_classification"}
    made = {
        "sentiment": save_bert_head(root / "sentiment", sequence, labels=("bad", "good")),
        "topics": save_bert_head(root / "topics", sequence, **several),
        "stars": save_bert_head(root / "stars", sequence, labels=("x",), problem_type="regression"),
        "ner": save_bert_head(root / "ner", "ForTokenClassification", labels=tags),
        "qa": save_bert_head(root / "qa", "ForQuestionAnswering"),
        "choice": save_bert_head(root / "choice", "ForMultipleChoice"),
    }
    return {name: str(path) for name, path in made.items()}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["predict", *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_predictions_of_texts_and_of_rows_are_those_of_the_pipeline(folders, tmp_path: Path, capsys) -> None:
    model = folders["sentiment"]
    with fastserve.pipeline(None, model) as classify:
        expected = classify(TEXTS)
    document = json.loads(run(capsys, model, *TEXTS, "--json"))
    assert document == {"task": "text-classification", "predictions": expected}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text, "label": "good"}) + "\n" for text in TEXTS))
    assert json.loads(run(capsys, model, "--data", str(rows), "--json")) == document
    table = tmp_path / "rows.csv"
    table.write_text("text,label\n" + "".join(f'"{text}",good\n' for text in TEXTS))
    assert json.loads(run(capsys, model, "--data", str(table), "--json")) == document


def test_each_prediction_is_a_line_for_people(folders, capsys) -> None:
    lines = run(capsys, folders["sentiment"], *TEXTS).splitlines()
    assert [line.split()[0] in ("bad", "good") for line in lines] == [True, True]
    for name in ("topics", "stars", "ner"):
        assert len(run(capsys, folders[name], *TEXTS).splitlines()) == 2
    with fastserve.pipeline(None, folders["qa"]) as answer:
        found = answer("who?", TEXTS[1])
    line = run(capsys, folders["qa"], TEXTS[1], "--question", "who?")
    assert line.strip() == f"{found['answer']} {found['score']:.3f}".strip()
    line = run(capsys, folders["choice"], *TEXTS, "--question", "who?")
    assert line.rsplit(maxsplit=1)[0] in TEXTS


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("sentiment", [], "nothing to predict for"),
        ("sentiment", ["a", "--data", "b.jsonl"], "nothing to predict for"),
        ("sentiment", ["a", "--question", "b"], "leave --question out"),
        ("qa", ["a"], "give --question"),
        ("qa", ["a", "--task", "token-classification"], "has no head for token-classification"),
        ("sentiment", ["a", "--task", "relation-extraction"], "too little for relation-extraction"),
        ("sentiment", ["cat " * 200], "202 tokens; the model takes at most 128"),
    ],
)
def test_what_cannot_be_predicted_is_one_line(folders, capsys, name: str, arguments, message: str) -> None:
    assert main(["predict", folders[name], *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_row_that_cannot_be_predicted_is_named_by_file_and_line(folders, tmp_path: Path, capsys) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a cat"}\n{"txt": "a dog"}\n')
    assert main(["predict", folders["sentiment"], "--data", str(rows)]) == 2
    assert f"{rows}:2: text is None; a text was expected" in capsys.readouterr().err


def test_a_model_that_generates_text_is_refused(shared_data: Path, capsys) -> None:
    assert main(["predict", str(shared_data / "model_stories260K"), "a"]) == 2
    assert "generates text, for which there is no pipeline" in capsys.readouterr().err
