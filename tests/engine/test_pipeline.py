"""`fastserve.pipeline` against `transformers`, on tiny random models that it has saved."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastserve
from fastserve.engine.task.token_classification import entities_of_tags, word_offsets
from fastserve.errors import ContextLengthError, OptionError, UnsupportedError
from tiny_heads import open_with_transformers, run_with_transformers, save_bert_head, softmax

pytest.importorskip("fastserve._native")

TEXTS = ["the cat sat.", "Ada Lovelace was born in London", "?", "bad, bad cat! " * 6]
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
CLOSE = 5e-4  # keys and values are kept as f16
BACKENDS = ["native", "torch"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("heads")
    sequence = "ForSequenceClassification"
    return {
        "sentiment": save_bert_head(root / "sentiment", sequence, labels=("bad", "good", "so-so")),
        "topics": save_bert_head(
            root / "topics", sequence, labels=("a", "b", "c"), problem_type="multi_label_classification"
        ),
        "stars": save_bert_head(root / "stars", sequence, labels=("value",), problem_type="regression"),
        "pairs": save_bert_head(
            root / "pairs",
            sequence,
            labels=("no", "yes"),
            card={"task": "pair-classification", "max_length": 48},
        ),
        "relation": save_bert_head(
            root / "relation", sequence, labels=("born_in", "other"), card={"task": "relation-extraction"}
        ),
        "ner": save_bert_head(
            root / "ner", "ForTokenClassification", labels=TAGS, card={"max_length": 32, "stride": 8}
        ),
        "qa": save_bert_head(root / "qa", "ForQuestionAnswering", card={"max_length": 40, "stride": 10}),
        "choice": save_bert_head(root / "choice", "ForMultipleChoice"),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_and_probabilities_are_those_of_transformers(folders, backend: Any) -> None:
    model, tokenizer = open_with_transformers(folders["sentiment"], "ForSequenceClassification")
    with fastserve.pipeline("text-classification", folders["sentiment"], backend=backend) as classify:
        assert classify.labels == ("bad", "good", "so-so")
        for text, found in zip(TEXTS, classify(TEXTS), strict=True):
            shares = softmax(run_with_transformers(model, tokenizer([text]))["logits"][0])
            assert found["label"] == model.config.id2label[int(shares.argmax())]
            np.testing.assert_allclose(list(found["probabilities"].values()), shares, atol=CLOSE)
            assert found["score"] == max(found["probabilities"].values())
            if backend == "native":
                assert classify(text) == found
            with_pair = run_with_transformers(model, tokenizer([text], ["a cat"]))["logits"][0]
            np.testing.assert_allclose(
                list(classify(text, "a cat")["probabilities"].values()), softmax(with_pair), atol=CLOSE
            )


def test_several_labels_and_numbers_are_read_off_the_logits_as_trained(folders) -> None:
    model, tokenizer = open_with_transformers(folders["topics"], "ForSequenceClassification")
    logits = run_with_transformers(model, tokenizer([TEXTS[0]]))["logits"][0]
    with fastserve.pipeline("text-classification", folders["topics"]) as classify:
        found = classify(TEXTS[0])
    np.testing.assert_allclose(list(found["probabilities"].values()), 1 / (1 + np.exp(-logits)), atol=CLOSE)
    assert found["labels"] == [label for label, logit in zip("abc", logits, strict=True) if logit >= 0]
    model, tokenizer = open_with_transformers(folders["stars"], "ForSequenceClassification")
    logits = run_with_transformers(model, tokenizer([TEXTS[0]]))["logits"][0]
    with fastserve.pipeline(None, folders["stars"]) as rate:
        assert rate(TEXTS[0]) == {"value": pytest.approx(float(logits[0]), abs=2e-3)}


@pytest.mark.parametrize("lengths", [(60, 3), (3, 60), (40, 41), (1, 1)])
def test_pairs_that_are_too_long_are_cut_as_transformers_cuts_them(folders, lengths) -> None:
    model, tokenizer = open_with_transformers(folders["pairs"], "ForSequenceClassification")
    first, second = ("cat " * lengths[0]).strip(), ("good " * lengths[1]).strip()
    encoded = tokenizer([first], [second], truncation=True, max_length=48)
    shares = softmax(run_with_transformers(model, encoded)["logits"][0])
    with fastserve.pipeline("pair-classification", folders["pairs"]) as classify:
        found = classify(first, second, truncate=True)
        np.testing.assert_allclose(list(found["probabilities"].values()), shares, atol=CLOSE)
        # What it is not asked to cut it reads whole, as far as its positions go.
        whole = run_with_transformers(model, tokenizer([first], [second]))["logits"][0]
        found = classify(first, second)
        np.testing.assert_allclose(list(found["probabilities"].values()), softmax(whole), atol=CLOSE)
        with pytest.raises(ContextLengthError, match="the model takes at most 128"):
            classify("cat " * 130, second)
        with pytest.raises(OptionError, match="there is one text"):
            classify(first)


def tags_by_transformers(folder: Path, words: list[str]) -> list[str]:
    """Of each word, the tag of its first token, of the window that has more around it."""
    model, tokenizer = open_with_transformers(folder, "ForTokenClassification")
    encoded = tokenizer(
        words,
        is_split_into_words=True,
        truncation=True,
        max_length=32,
        stride=8,
        return_overflowing_tokens=True,
    )
    best: dict[int, tuple[int, str]] = {}
    names = ("input_ids", "attention_mask", "token_type_ids")
    for number in range(len(encoded["input_ids"])):
        one = {name: [encoded[name][number]] for name in names}
        rows = run_with_transformers(model, one)["logits"][0]
        ids = encoded.word_ids(number)
        for place, word in enumerate(ids):
            is_first = word is not None and (place == 0 or ids[place - 1] != word)
            room = min(place, len(ids) - place)
            # A word that a window begins within is the other window's.
            if is_first and room > best.get(word, (-1, ""))[0]:
                best[word] = room, model.config.id2label[int(rows[place].argmax())]
    return [best[word][1] for word in range(len(words))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("times", [1, 7])
def test_tags_are_those_of_transformers_also_of_texts_longer_than_the_model(folders, backend, times) -> None:
    text = " ".join(["Ada Lovelace, was born in London (good)!"] * times)
    with fastserve.pipeline("token-classification", folders["ner"], backend=backend) as tag:
        found = tag(text)
        words = [text[start:end] for start, end in word_offsets(text)]
        assert found["tokens"] == words
        assert found["tags"] == tags_by_transformers(folders["ner"], words)
        given = tag([words, text])
    assert given[0]["tags"] == given[1]["tags"] == found["tags"]
    spans = entities_of_tags(found["tags"])
    assert len(spans) > 0
    for entity, (first, end, label), other in zip(
        found["entities"], spans, given[0]["entities"], strict=True
    ):
        assert entity["label"] == label == other["label"]
        assert entity["text"] == text[entity["start"] : entity["end"]]
        assert entity["text"].startswith(words[first])
        assert entity["text"].endswith(words[end - 1])
        assert entity["score"] == pytest.approx(np.mean(found["scores"][first:end]))
        assert (other["first_token"], other["end_token"]) == (first, end)


def answer_by_transformers(folder: Path, question: str, context: str) -> tuple[float, int, int, float]:
    """The best answer of at most 30 tokens, by all pairs in all windows, and the score of none."""
    model, tokenizer = open_with_transformers(folder, "ForQuestionAnswering")
    encoded = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=40,
        stride=10,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    best, none = (-1.0, 0, 0), 1.0
    names = ("input_ids", "attention_mask", "token_type_ids")
    for number in range(len(encoded["input_ids"])):
        outputs = run_with_transformers(model, {name: [encoded[name][number]] for name in names})
        is_context = [part == 1 for part in encoded.sequence_ids(number)]
        may_be = np.array([True, *is_context[1:]])
        start, end = (
            softmax(np.where(may_be, outputs[f"{edge}_logits"][0], -np.inf)) for edge in ("start", "end")
        )
        none = min(none, start[0] * end[0])
        for a, b in itertools.product(range(len(start)), repeat=2):
            if is_context[a] and is_context[b] and a <= b < a + 30 and start[a] * end[b] > best[0]:
                offsets = encoded["offset_mapping"][number]
                best = start[a] * end[b], offsets[a][0], offsets[b][1]
    return *best, none


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("times", [1, 6])
def test_answers_are_those_of_transformers_also_in_texts_longer_than_the_model(
    folders, backend, times
) -> None:
    context = " ".join(f"Ada Lovelace was born in London, {i} the cat sat." for i in range(times))
    score, start, end, none = answer_by_transformers(folders["qa"], "who was born?", context)
    with fastserve.pipeline("question-answering", folders["qa"], backend=backend) as answer:
        found = answer("who was born?", context, can_be_unanswerable=False)
        assert (found["start"], found["end"], found["answer"]) == (start, end, context[start:end])
        assert found["score"] == pytest.approx(score, abs=CLOSE)
        assert found["no_answer_score"] == pytest.approx(none, abs=CLOSE)
        asked = answer(["who was born?", "who?"], context)
    assert asked[0]["answer"] == ("" if none > score else found["answer"])


def test_an_answer_is_none_where_the_text_has_none(folders, tmp_path) -> None:
    import torch
    from transformers import AutoModelForQuestionAnswering

    folder = save_bert_head(tmp_path / "qa", "ForQuestionAnswering")
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    with torch.no_grad():  # the first token, which has a vector of its own, has the highest logits
        vector = model.bert(torch.tensor([[2, 15, 3, 16, 3]]))[0][0, 0]
        model.qa_outputs.weight.copy_(torch.stack([vector, vector]))
    model.save_pretrained(folder)
    with fastserve.pipeline("question-answering", folder) as answer:
        found = answer("g", "h")
        assert (found["answer"], found["start"], found["end"]) == ("", 0, 0)
        assert found["score"] == found["no_answer_score"] > 0.5
        assert answer("g", "h", can_be_unanswerable=False)["answer"] == "h"


def test_choices_are_those_of_transformers(folders) -> None:
    model, tokenizer = open_with_transformers(folders["choice"], "ForMultipleChoice")
    question, choices = "the cat", ["sat.", "was born in London", "good"]
    encoded = tokenizer([question] * 3, choices, padding=True)
    logits = run_with_transformers(model, {name: [values] for name, values in encoded.items()})["logits"][0]
    with fastserve.pipeline("multiple-choice", folders["choice"]) as choose:
        found = choose(question, choices)
    np.testing.assert_allclose(found["scores"], softmax(logits), atol=CLOSE)
    assert (found["choice"], found["text"]) == (logits.argmax(), choices[logits.argmax()])


def test_a_relation_is_that_of_the_text_with_markers(folders) -> None:
    model, tokenizer = open_with_transformers(folders["relation"], "ForSequenceClassification")
    text = "Ada was born in London"
    head, tail = {"start": 16, "end": 22}, {"start": 0, "end": 3}
    marked = "[E2] Ada [/E2] was born in [E1] London [/E1]"
    shares = softmax(run_with_transformers(model, tokenizer([marked]))["logits"][0])
    with fastserve.pipeline("relation-extraction", folders["relation"]) as relate:
        found = relate(text, head, tail)
        np.testing.assert_allclose(list(found["probabilities"].values()), shares, atol=CLOSE)
        (row,) = relate.predict(
            [{"tokens": text.split(), "head": {"start": 4, "end": 5}, "tail": {"start": 0, "end": 1}}]
        )
        assert row == found
        for wrong in ({"start": 20, "end": 23}, {"start": 1, "end": 1}, {"start": 2, "end": 17}):
            with pytest.raises(OptionError, match=r"the text has 22 characters|overlap"):
                relate(text, head, wrong)


def test_rows_of_data_are_predicted_as_calls_are(folders) -> None:
    rows = [{"text": text, "label": "good"} for text in TEXTS]
    with fastserve.pipeline("text-classification", folders["sentiment"]) as classify:
        assert list(classify.predict(rows)) == classify(TEXTS)
        with pytest.raises(OptionError, match="text is None; a text was expected"):
            list(classify.predict([{"label": "good"}]))


def test_a_prediction_does_not_depend_on_what_else_is_predicted(folders) -> None:
    texts = [f"{'cat ' * (i * 7 % 40)}number {i}" for i in range(40)]
    with fastserve.pipeline("text-classification", folders["sentiment"], max_batch_tokens=128) as classify:
        assert classify(texts) == [classify(text) for text in texts]


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("qa", "token-classification", "is for question-answering; it has no head for token-classification"),
        ("relation", "text-classification", "is for relation-extraction"),
        ("ner", "embedding", "it has no embeddings"),
    ],
)
def test_a_model_of_another_task_is_refused(folders, name: str, task: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        fastserve.pipeline(task, folders[name])


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(OptionError, match="task='poetry' is unknown"):
        fastserve.pipeline("poetry", "anything")


@pytest.mark.parametrize(
    ("tags", "scheme", "entities"),
    [
        ("B-A I-A B-A O I-B", None, [(0, 2, "A"), (2, 3, "A"), (4, 5, "B")]),
        ("I-A I-A B-A", None, [(0, 2, "A"), (2, 3, "A")]),
        ("S-A B-B M-B E-B S-B", None, [(0, 1, "A"), (1, 4, "B"), (4, 5, "B")]),
        ("U-A B-B L-B L-B", None, [(0, 1, "A"), (1, 3, "B"), (3, 4, "B")]),
        ("A A O B", None, [(0, 2, "A"), (3, 4, "B")]),
        ("E-mail E-mail O", "io", [(0, 2, "E-mail")]),
    ],
)
def test_tags_of_any_scheme_spell_entities(tags: str, scheme: str | None, entities) -> None:
    assert entities_of_tags(tags.split(), scheme) == entities


def test_words_of_scripts_without_spaces_are_characters() -> None:
    text = "Hi北京, 42nd!"
    assert [text[a:b] for a, b in word_offsets(text)] == ["Hi", "北", "京", ",", "42nd", "!"]
