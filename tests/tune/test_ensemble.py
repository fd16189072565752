"""Models that become one: what it predicts follows from what they do, evaluated and served alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastserve
from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.cli.main import main
from fastserve.config import EngineOptions
from fastserve.data import load_data
from fastserve.engine.load import load_model, plan_model
from fastserve.errors import CheckpointError, DataError, OptionError, UnsupportedError
from fastserve.evaluate.prediction import PredictorOptions
from fastserve.evaluate.task_evaluation import evaluate_folder
from fastserve.tune.ensemble import make_ensemble
from tiny_heads import open_with_transformers, run_with_transformers, save_bert_head, save_roberta_head

pytest.importorskip("fastserve._native")

WriteRows = Callable[[str, list[dict[str, Any]]], Path]

SEQUENCE, TOKENS = "ForSequenceClassification", "ForTokenClassification"
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
TEXTS = [
    f"{who} was born in {where}{mark}"
    for who in ("ada", "the cat")
    for where in ("london", "北京", "love")
    for mark in ".?!,"
]
RELATION = {"head": {"start": 0, "end": 3}, "tail": {"start": 16, "end": 22}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models: three of texts, whose labels are not in one order, two taggers, and others."""
    root = tmp_path_factory.mktemp("members")
    text, tags = {"task": "text-classification", "max_length": 64}, {"task": "token-classification"}
    pairs = {"task": "pair-classification"}
    several = {"labels": ("a", "b", "c"), "problem_type": "multi_label_classification"}
    number = {"labels": ("value",), "problem_type": "regression"}
    relation = {"task": "relation-extraction"}
    bracketed = {**relation, "markers": ["(", ")", "[", "]"]}
    return {
        "x": save_bert_head(root / "x", SEQUENCE, labels=("bad", "good", "so-so"), card=text, seed=1),
        "y": save_bert_head(root / "y", SEQUENCE, labels=("bad", "good", "so-so"), card=text, seed=2),
        "z": save_roberta_head(root / "z", SEQUENCE, labels=("so-so", "bad", "good"), card=text, seed=3),
        "two": save_bert_head(root / "two", SEQUENCE, labels=("bad", "good"), card=text),
        "more": save_bert_head(root / "more", SEQUENCE, labels=("bad", "good", "fair"), card=text),
        "pairs": save_bert_head(root / "pairs", SEQUENCE, labels=("bad", "good", "so-so"), card=pairs),
        "several": save_bert_head(root / "several", SEQUENCE, seed=1, **several),
        "several2": save_bert_head(root / "several2", SEQUENCE, seed=2, **several),
        "number": save_bert_head(root / "number", SEQUENCE, seed=1, **number),
        "number2": save_roberta_head(root / "number2", SEQUENCE, seed=2, **number),
        "ner": save_bert_head(root / "ner", TOKENS, labels=TAGS, card=tags, seed=1),
        "ner2": save_roberta_head(root / "ner2", TOKENS, labels=TAGS[::-1], card=tags, seed=2),
        "relation": save_bert_head(root / "relation", SEQUENCE, labels=("r", "s"), card=relation, seed=1),
        "relation2": save_roberta_head(root / "r2", SEQUENCE, labels=("s", "r"), card=bracketed, seed=2),
        "qa": save_bert_head(root / "qa", "ForQuestionAnswering"),
    }  # fmt: skip


def predictions_of(folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    with fastserve.pipeline(None, folder) as pipe:
        return list(pipe.predict(rows))


def means_of(folders: list[Path], rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Of each row, by label, the mean of the probabilities that models give alone."""
    said = [predictions_of(folder, rows) for folder in folders]
    labels = said[0][0]["probabilities"]
    return [
        {label: float(np.mean([one["probabilities"][label] for one in row])) for label in labels}
        for row in zip(*said, strict=True)
    ]


def test_an_average_is_the_mean_of_what_members_say_whatever_their_tokenizers_and_orders(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    rows = [{"text": text} for text in TEXTS]
    members = [folders[name] for name in "xyz"]
    made = make_ensemble(members, tmp_path / "all")
    expected = means_of(members, rows)
    for prediction, means in zip(predictions_of(made.path, rows), expected, strict=True):
        assert prediction["probabilities"] == pytest.approx(means, abs=1e-9)
        assert prediction["label"] == max(means, key=lambda label: means[label])
        assert prediction["score"] == max(prediction["probabilities"].values())
    weighted = make_ensemble(members[:2], tmp_path / "weighted", weights=[1, 0])
    alone = predictions_of(members[0], rows)
    assert [p["label"] for p in predictions_of(weighted.path, rows)] == [p["label"] for p in alone]


@pytest.mark.parametrize(
    ("kind", "row"),
    [("several", {"text": TEXTS[0]}), ("relation", {"text": "ada was born in london", **RELATION})],
)
def test_labels_that_may_be_several_and_relations_are_averaged_too(
    kind: str, row: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    members = [folders[kind], folders[f"{kind}2"]]
    made = make_ensemble(members, tmp_path / "all")
    (prediction,) = predictions_of(made.path, [row])
    assert prediction["probabilities"] == pytest.approx(means_of(members, [row])[0], abs=1e-9)


def test_numbers_are_averaged_and_nothing_else(folders: dict[str, Path], tmp_path: Path) -> None:
    members, rows = [folders["number"], folders["number2"]], [{"text": text} for text in TEXTS]
    made = make_ensemble(members, tmp_path / "all")
    said = [[p["value"] for p in predictions_of(folder, rows)] for folder in (*members, made.path)]
    assert said[2] == pytest.approx(np.mean(said[:2], axis=0).tolist(), abs=1e-9)
    with pytest.raises(UnsupportedError, match="vote is for labels; the members give numbers"):
        make_ensemble(members, tmp_path / "vote", method="vote")


def test_the_label_of_most_members_wins(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"text": text} for text in TEXTS]
    members = [folders[name] for name in "xyz"]
    made = make_ensemble(members, tmp_path / "all", method="vote")
    votes = zip(*([p["label"] for p in predictions_of(folder, rows)] for folder in members), strict=True)
    found = predictions_of(made.path, rows)
    num_clear = 0
    for vote, prediction in zip(votes, found, strict=True):
        for label in set(vote):
            assert prediction["probabilities"][label] == pytest.approx(vote.count(label) / 3, abs=1e-5)
            if vote.count(label) > 1:
                assert prediction["label"] == label
                num_clear += 1
    assert num_clear


def test_tags_are_averaged_word_by_word_though_members_cut_words_otherwise(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    words = ["Ada", "Lovelace", ",", "born", "in", "北京", "london", "!"] * 3
    shares = []
    for name, reverse in (("ner", False), ("ner2", True)):
        model, tokenizer = open_with_transformers(folders[name], TOKENS)
        encoded = tokenizer([words], is_split_into_words=True)
        logits = run_with_transformers(model, encoded)["logits"][0].astype(np.float64)
        ids = encoded.word_ids(0)
        first = [ids.index(word) for word in range(len(words))]
        powers = np.exp(logits[first])
        rows = powers / powers.sum(axis=1, keepdims=True)
        shares.append(rows[:, ::-1] if reverse else rows)
    mean = np.mean(shares, axis=0)
    made = make_ensemble([folders["ner"], folders["ner2"]], tmp_path / "all")
    (found,) = predictions_of(made.path, [{"tokens": words}])
    assert found["tags"] == [TAGS[best] for best in mean.argmax(axis=1)]
    assert found["scores"] == pytest.approx(mean.max(axis=1).tolist(), abs=1e-3)
    # Texts longer than a member takes are cut into windows of its own.
    (long,) = predictions_of(made.path, [{"tokens": words * 8}])
    assert len(long["tags"]) == len(words) * 8


def test_stacking_learns_whom_to_believe(
    folders: dict[str, Path], write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = [{"text": f"{text} {word}"} for text in TEXTS for word in ("the", "cat", "sat", "good")]
    members = [folders[name] for name in "yzx"]
    right = predictions_of(members[2], rows)  # the last is always right
    data = write_rows("dev", [{**row, "label": p["label"]} for row, p in zip(rows, right, strict=True)])
    average = make_ensemble(members, tmp_path / "average", data=data)
    made = make_ensemble(members, tmp_path / "stacked", method="stacking", data=data, penalty=0.01)
    assert [metrics["accuracy"] == 1.0 for metrics in made.member_metrics] == [False, False, True]
    assert average.metrics["accuracy"] < 0.95
    assert made.metrics["accuracy"] >= 0.97
    assert made.member_metrics == average.member_metrics
    stored = json.loads((made.path / "fastserve.json").read_text("utf-8"))
    assert stored["metrics"] == made.metrics
    evaluation = evaluate_folder(made.path, load_data(data, "text-classification"))
    assert evaluation.backend == "native"
    assert evaluation.scores.metrics == pytest.approx(made.metrics, abs=1e-12)


def test_stacking_learns_tags_word_by_word(
    folders: dict[str, Path], write_rows: WriteRows, tmp_path: Path
) -> None:
    tag_of = {"ada": "B-PER", "lovelace": "I-PER", "london": "B-LOC"}
    tokens = [["ada", "was", "born", "in", "london"], ["ada", "lovelace", ",", "北京"], ["the", "cat"]] * 6
    rows = [{"tokens": row, "tags": [tag_of.get(word, "O") for word in row]} for row in tokens]
    data = write_rows("dev", rows)
    members = [folders["ner2"], folders["ner"]]
    made = make_ensemble(members, tmp_path / "all", method="stacking", data=data, penalty=1e-4)
    assert max(metrics["accuracy"] for metrics in made.member_metrics) < 0.9
    assert made.metrics["accuracy"] > 0.95
    evaluation = evaluate_folder(made.path, load_data(data, "token-classification"))
    assert evaluation.scores.metrics == pytest.approx(made.metrics, abs=1e-12)


def test_an_ensemble_holds_its_members_and_is_planned_as_it_is_loaded(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    copies = [shutil.copytree(folders[name], tmp_path / name) for name in "xz"]
    made = make_ensemble(copies, tmp_path / "all")
    weights = made.path / "1-x" / "model.safetensors"
    assert weights.stat().st_ino == (copies[0] / "model.safetensors").stat().st_ino
    for folder in copies:
        shutil.rmtree(folder)
    assert predictions_of(made.path, [{"text": TEXTS[0]}])[0]["label"] in ("bad", "good", "so-so")
    plan = plan_model(made.path, EngineOptions())
    loaded = load_model(made.path, EngineOptions())
    assert plan.total_bytes == loaded.footprint.total_bytes
    assert plan.context_length == loaded.context_length == 128
    assert len(loaded.members) == 2
    assert loaded.reading_length == 64  # of texts that are cut
    with pytest.raises(UnsupportedError, match="is an ensemble of models"):
        open_checkpoint(made.path)
    with pytest.raises(UnsupportedError, match="is an ensemble, which PyTorch does not open"):
        evaluate_folder(made.path, [{"text": "a", "label": "bad"}], PredictorOptions(backend="torch"))
    with pytest.raises(UnsupportedError, match="it does not generate text"):
        fastserve.LLM(made.path, task="generate")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x", "two"], r"member .*two lacks the label 'so-so'"),
        (["two", "x"], r"member .*x has the label 'so-so', which is none of bad, good"),
        (["x", "more"], r"member .*more lacks the label 'so-so'"),
        (["x", "pairs"], r"member .*pairs is for pair-classification, not for text-classification"),
        (["x", "several"], r"member .*several is for multi_label_classification, not for single_label"),
        (["x", "ner"], r"member .*ner is for token-classification, not for text-classification"),
        (["qa", "qa"], r"member .*qa is for question-answering, of which there are no ensembles"),
    ],
)
def test_members_that_disagree_are_refused_by_name(
    names: list[str], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        make_ensemble([folders[name] for name in names], tmp_path / "all")
    assert not list(tmp_path.iterdir())


def test_an_ensemble_of_an_ensemble_and_one_whose_member_was_exchanged_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    made = make_ensemble([folders["x"], folders["y"]], tmp_path / "all")
    with pytest.raises(UnsupportedError, match=r"member .*all is an ensemble itself"):
        make_ensemble([folders["x"], made.path], tmp_path / "more")
    shutil.rmtree(made.path / "2-y")
    shutil.copytree(folders["two"], made.path / "2-y")
    with pytest.raises(CheckpointError, match=r"member 2-y of .*all lacks the label 'so-so'"):
        fastserve.pipeline(None, made.path)


def test_options_that_do_not_fit_are_refused(
    folders: dict[str, Path], write_rows: WriteRows, tmp_path: Path
) -> None:
    two = [folders["x"], folders["y"]]
    for members, options, message in (
        (two[:1], {}, "two members or more, not 1"),
        (two, {"method": "stacking"}, "stacking learns from rows"),
        (two, {"weights": [1.0]}, "there are 1 weights for 2 members"),
        (two, {"weights": [0.0, 0.0]}, "all weights are 0"),
        (two, {"method": "stacking", "data": "d", "weights": [1.0, 1.0]}, "stacking finds its own weights"),
    ):
        with pytest.raises(OptionError, match=message):
            make_ensemble(members, tmp_path / "all", **options)
    data = write_rows("dev", [{"text": "a", "label": "bad"}, {"text": "b", "label": "worse"}])
    with pytest.raises(DataError, match=r"dev.jsonl:2: label 'worse' is none that the members know"):
        make_ensemble(two, tmp_path / "all", data=data)
    assert not (tmp_path / "all").exists()
    assert not (tmp_path / "all.part").exists()


def test_the_command_makes_an_ensemble_that_others_take(
    folders: dict[str, Path], write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows("dev", [{"text": text, "label": "good"} for text in TEXTS])
    output = tmp_path / "all"
    command = ["ensemble", str(folders["x"]), str(folders["z"]), "--output", str(output), "--data", str(data)]
    assert main([*command, "--method", "vote", "--weights", "2,1", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["weights"] == [2.0, 1.0]
    assert main(["evaluate", str(output), "--data", str(data), "--compare", str(folders["x"]), "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["metrics"] == pytest.approx(made["metrics"])
    assert evaluated["compare"]["metrics"] == pytest.approx(made["members"][0]["metrics"])
    assert main(["predict", str(output), TEXTS[0]]) == 0
    assert capsys.readouterr().out.split()[0] in ("bad", "good", "so-so")
    assert main([*command, "--weights", "2,x"]) == 2
    assert "has what is no number" in capsys.readouterr().err
