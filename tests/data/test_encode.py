from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from fastserve.data import create_vocab, encode_data, label_names, load_data, open_tokenizer
from fastserve.errors import DataError


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    """WordPiece of some words and all letters, with BERT's special tokens."""
    letters = [*string.ascii_letters, "?"]
    words = ["[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)]
    words += ["good", "bad", "film", "met", "in", "Ann", "Bob"]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(["[CLS]", "[SEP]"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    return backend


def test_labels_become_indexes_of_their_sorted_names(tokenizer: tokenizers.Tokenizer) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "a good film", "label": "pos"},
        {"text": "a bad film", "label": "neg"},
    ]
    encoded = encode_data(rows, tokenizer)
    assert [example["label"] for example in encoded] == [1, 0]
    assert encoded[0]["input_ids"] == tokenizer.encode("a good film").ids
    assert [example["label"] for example in encode_data(rows, tokenizer, labels=["pos", "neg"])] == [0, 1]
    with pytest.raises(DataError, match="row 2: label 'neg' is none of 1 known ones"):
        encode_data(rows, tokenizer, labels=["pos"])
    assert encode_data([{"text": "a", "label": 0.5}], tokenizer)[0]["label"] == 0.5
    assert encode_data([{"text": "a", "labels": ["x", "y"]}], tokenizer)[0]["labels"] == [0, 1]


def test_pairs_have_types(tokenizer: tokenizers.Tokenizer) -> None:
    (example,) = encode_data([{"text": "a film", "text_pair": "a bad film", "label": "x"}], tokenizer)
    assert set(example["type_ids"]) == {0, 1}
    assert len(example["type_ids"]) == len(example["input_ids"])


def test_the_first_token_of_a_word_has_its_tag_and_the_others_none(tokenizer: tokenizers.Tokenizer) -> None:
    rows = [{"tokens": ["Ann", "likes", "Paris"], "tags": ["B-PER", "O", "B-LOC"]}]
    assert label_names(rows) == ["O", "B-LOC", "B-PER"]
    (example,) = encode_data(rows, tokenizer)
    words = tokenizer.encode(rows[0]["tokens"], is_pretokenized=True).word_ids
    assert len(words) > 5  # `likes` is of several tokens
    taught = [(word, label) for word, label in zip(words, example["labels"], strict=True) if label != -100]
    assert taught == [(0, 2), (1, 0), (2, 1)]


def test_answers_become_the_tokens_that_hold_them(tokenizer: tokenizers.Tokenizer) -> None:
    context = "Ann met Bob in Paris"
    row = {"context": context, "question": "Where did Ann meet Bob?"}
    answered = {**row, "answers": {"text": ["in Paris"], "answer_start": [12]}}
    (example,) = encode_data([answered], tokenizer)
    offsets = tokenizer.encode(row["question"], context).offsets
    assert context[offsets[example["start"]][0] : offsets[example["end"]][1]] == "in Paris"
    (example,) = encode_data([{**row, "answers": {"text": [], "answer_start": []}}], tokenizer)
    assert (example["start"], example["end"]) == (0, 0)
    with pytest.raises(DataError, match="row 1: the answer is not among the 10 tokens"):
        encode_data([answered], tokenizer, max_length=10, on_long="truncate")


def test_choices_and_targets_are_encoded(tokenizer: tokenizers.Tokenizer) -> None:
    (example,) = encode_data([{"question": "a film", "choices": ["good", "bad"], "label": 1}], tokenizer)
    assert [len(choice["input_ids"]) for choice in example["choices"]] == [
        len(tokenizer.encode("a film", other).ids) for other in ("good", "bad")
    ]
    (example,) = encode_data([{"source": "good", "target": "bad"}], tokenizer)
    assert example["labels"] == tokenizer.encode("bad").ids


def test_what_is_too_long_is_an_error_or_dropped_or_cut_with_its_special_tokens(
    tokenizer: tokenizers.Tokenizer,
) -> None:
    rows = [{"text": "a good film"}, {"text": "a"}]
    with pytest.raises(DataError, match="row 1: 5 tokens; the limit is 4"):
        encode_data(rows, tokenizer, max_length=4)
    assert len(encode_data(rows, tokenizer, max_length=4, on_long="drop")) == 1
    cut = encode_data(rows, tokenizer, max_length=4, on_long="truncate")[0]["input_ids"]
    assert len(cut) == 4
    assert cut[-1] == tokenizer.token_to_id("[SEP]")
    assert len(tokenizer.encode("a good film").ids) == 5  # the caller's tokenizer does not cut
    vocabulary = create_vocab(rows)
    assert encode_data(rows, vocabulary, max_length=2, on_long="truncate")[0]["input_ids"] == [4, 6]


def test_messages_are_left_to_the_models_template(tokenizer: tokenizers.Tokenizer) -> None:
    with pytest.raises(DataError, match="messages are encoded by a model's chat template"):
        encode_data([{"messages": []}], tokenizer)


def test_a_real_set_is_encoded_by_a_real_tokenizer(shared_data: Path) -> None:
    tokenizer = open_tokenizer(shared_data / "tokenizer_vectors" / "ggml-vocab-bert-bge.gguf")
    rows = load_data(shared_data / "ner_wnut17" / "dev.conll", "token-classification")
    encoded = encode_data(rows, tokenizer)
    names = label_names(rows)
    num_without = 0
    for row, example in zip(rows, encoded, strict=True):
        has_tokens = [bool(tokenizer.encode(word, add_special_tokens=False).ids) for word in row["tokens"]]
        num_without += has_tokens.count(False)
        expected = [tag for tag, has in zip(row["tags"], has_tokens, strict=True) if has]
        assert [names[label] for label in example["labels"] if label != -100] == expected
    assert num_without < 5  # variation selectors, which BERT's normalizer takes out
