"""The examples of tuning run as they are, on a few rows and tiny models; and the names that tutorials
import."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

import fastserve
from fastserve.errors import DataError

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
ENCODER_EXAMPLES = ["sentiment", "chinese_subjects", "relations", "answers", "ner_bert"]


def run_example(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("name", ENCODER_EXAMPLES)
def test_an_example_runs_on_a_few_rows(
    name: str, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_example(name, "--model", str(tiny_encoder), "--rows", "12", "--epochs", "1", monkeypatch=monkeypatch)
    output = capsys.readouterr().out
    expected = {
        "sentiment": "slow, cold and dull: ",
        "chinese_subjects": "macro F1 of the dev rows: ",
        "relations": "Ada was born in London in 1900. ",
        "answers": "'no_answer_score'",
        "ner_bert": "weighted avg",
    }
    assert expected[name] in output


def test_the_program_of_tutorials_learns_and_writes_a_folder_that_the_pipeline_opens(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "ner"
    arguments = ["--model", str(tiny_encoder), "--epochs", "3", "--output", str(output)]
    run_example("ner_bert", *arguments, monkeypatch=monkeypatch)
    losses = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert float(losses[-1]) < float(losses[0])
    with fastserve.pipeline("token-classification", output) as tag:
        assert tag("Ada lives in Paris.")["tokens"] == ["Ada", "lives", "in", "Paris", "."]


def test_the_chat_example_runs_on_a_few_rows(
    tiny_decoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(tiny_decoder), "--rows", "4", "--steps", "2"]
    run_example("chat_lora", *arguments, monkeypatch=monkeypatch)
    assert "2 steps in" in capsys.readouterr().out


def test_a_name_of_the_field_is_the_class_of_transformers_that_opens_what_we_name(tiny_encoder: Path) -> None:
    import torch
    import transformers

    assert issubclass(fastserve.BertForTokenClassification, transformers.BertForTokenClassification)
    assert fastserve.AdamW is torch.optim.AdamW
    model = fastserve.AutoModelForSequenceClassification.from_pretrained(tiny_encoder, num_labels=3)
    assert type(model) is transformers.BertForSequenceClassification


def test_a_gguf_file_opens_by_the_names_of_the_field(shared_data: Path) -> None:
    path = shared_data / "model_stories260K" / "stories260K.gguf"
    tokenizer = fastserve.AutoTokenizer.from_pretrained(path)
    model = fastserve.AutoModelForCausalLM.from_pretrained(path)
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0]).startswith(
        "<s> Once upon a time, there was"
    )


def test_a_report_of_tag_lists_counts_whole_entities() -> None:
    right = [["B-PER", "I-PER", "O"], ["B-LOC", "O", "O"]]
    said = [["B-PER", "O", "O"], ["B-LOC", "O", "B-PER"]]
    report = fastserve.classification_report(right, said, output_dict=True)
    assert report["LOC"] == {"precision": 1.0, "recall": 1.0, "f1-score": 1.0, "support": 1}
    assert report["PER"] == {"precision": 0.0, "recall": 0.0, "f1-score": 0.0, "support": 1}
    assert report["micro avg"]["precision"] == pytest.approx(1 / 3)


def test_a_report_of_sentences_that_differ_in_length_says_which() -> None:
    with pytest.raises(DataError, match="sentence 1 has 2 tags, and 1 predicted ones"):
        fastserve.classification_report([["O"], ["O", "O"]], [["O"], ["O"]])
