"""A tiny random encoder and decoder on disk, and files of rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

OVERLAP_KEPT = {"split-overlap": "keep"}
"""The rows here are few and repeat themselves: dev has texts of train."""

WORDS = [
    "good",
    "bad",
    "film",
    "the",
    "a",
    "is",
    "was",
    "in",
    "Paris",
    "Rome",
    "Bonn",
    "Ann",
    "Bob",
    "met",
    "of",
    "likes",
    "and",
    "yes",
    "no",
    "who",
    "where",
    "?",
    ".",
    ",",
    "!",
]
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers, 16 wide, whose vocabulary is WORDS and letters; its dropout is 0.1."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("encoder")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = dict.fromkeys(
        [*MARKS, *map(str.lower, WORDS), *letters, *(f"##{c}" for c in letters), "北", "京", "在"]
    )
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=256,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def word_tokenizer() -> Any:
    """Splits at spaces; a template writes roles in angle brackets."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "<user>", "<assistant>", "<system>", *WORDS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_tokens(["<user>", "<assistant>", "<system>"], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory: pytest.TempPathFactory, word_tokenizer: Any) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(word_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[str, Iterable[Mapping[str, Any]]], Path]:
    """A function of a name and rows that writes them as JSON lines."""

    def write(name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def film_rows(count: int) -> list[dict[str, Any]]:
    """Rows of two classes that one word tells apart."""
    return [
        {
            "text": f"the film {'is' if i % 3 else 'was'} {'good' if i % 2 else 'bad'} {WORDS[i % 20]}",
            "label": "ny"[i % 2],
        }
        for i in range(count)
    ]


def tune_to_films(model: Path, folder: Path, options: Any, *, num_rows: int) -> Path:
    """A model that has learned which films are good, by options of tuning; `folder` gets the rows, too."""
    from fastserve.tune import tune

    train = folder / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in film_rows(num_rows)), encoding="utf-8")
    task = "text-classification"
    return tune(task, model=str(model), train=train, output=folder / "out", options=options).path


def city_rows(count: int) -> list[dict[str, Any]]:
    """Sentences with a person and a city, tagged."""
    names, cities = ("Ann", "Bob"), ("Paris", "Rome", "Bonn")
    return [
        {
            "tokens": [names[i % 2], "met", names[(i + 1) % 2], "in", cities[i % 3], "."],
            "tags": ["B-PER", "O", "B-PER", "O", "B-LOC", "O"],
        }
        for i in range(count)
    ]
