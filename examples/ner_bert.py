"""Teach BERT to find entities, in the way that tutorials do: a Dataset, a DataLoader, a loop, a report.

    python examples/ner_bert.py --train train.conll --dev dev.conll --output my-ner
    python examples/ner_bert.py --rows 8 --epochs 1        # on sentences that it makes up

The folder that it writes is served by `fastserve serve my-ner`.
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.data import DataLoader, Dataset

from fastserve import AdamW, BertForTokenClassification, BertTokenizer, classification_report
from fastserve.data import load_data

MAX_LENGTH = 96


class TaggedSentences(Dataset):
    """Sentences as token ids, with a tag at the first piece of each word and -100 elsewhere."""

    def __init__(self, rows: list[dict], tokenizer: BertTokenizer, tag_ids: dict[str, int]) -> None:
        self.rows, self.tokenizer, self.tag_ids = rows, tokenizer, tag_ids

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        encoded = self.tokenizer(
            row["tokens"],
            is_split_into_words=True,
            truncation=True,
            padding="max_length",
            max_length=MAX_LENGTH,
            return_tensors="pt",
        )
        labels, before = [], None
        for word in encoded.word_ids(0):
            is_first = word is not None and word != before
            labels.append(self.tag_ids[row["tags"][word]] if is_first else -100)
            before = word
        item = {name: values[0] for name, values in encoded.items()}
        return {**item, "labels": torch.tensor(labels)}


def predict(model: BertForTokenClassification, loader: DataLoader, tags: list[str]) -> tuple[list, list]:
    """The tags of each sentence, as they are and as the model says."""
    right, said = [], []
    model.eval()
    with torch.no_grad():
        for batch in loader:
            best = model(**batch).logits.argmax(dim=-1)
            for labels, choices in zip(batch["labels"], best, strict=True):
                kept = labels != -100
                right.append([tags[i] for i in labels[kept].tolist()])
                said.append([tags[i] for i in choices[kept].tolist()])
    return right, said


def made_up_rows(count: int) -> list[dict]:
    people, places = ["Ada", "Grace", "Alan"], ["London", "Paris", "New York"]
    rows = []
    for i in range(count):
        place = places[i % 3].split()
        tags = ["B-PER", "O", "O", "B-LOC", *["I-LOC"] * (len(place) - 1), "O"]
        rows.append({"tokens": [people[i // 3 % 3], "lives", "in", *place, "."], "tags": tags})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="all-minilm-l6-v2")
    parser.add_argument("--train")
    parser.add_argument("--dev")
    parser.add_argument("--rows", type=int, help="use only so many")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.manual_seed(0)

    train = load_data(options.train, "token-classification") if options.train else made_up_rows(90)
    dev = load_data(options.dev, "token-classification") if options.dev else made_up_rows(9)
    train, dev = train[: options.rows], dev[: options.rows]
    tags = sorted({tag for row in [*train, *dev] for tag in row["tags"]})
    tag_ids = {tag: i for i, tag in enumerate(tags)}

    tokenizer = BertTokenizer.from_pretrained(options.model)
    model = BertForTokenClassification.from_pretrained(
        options.model, num_labels=len(tags), id2label=dict(enumerate(tags)), label2id=tag_ids
    )
    train_loader = DataLoader(TaggedSentences(train, tokenizer, tag_ids), batch_size=16, shuffle=True)
    dev_loader = DataLoader(TaggedSentences(dev, tokenizer, tag_ids), batch_size=32)
    optimizer = AdamW(model.parameters(), lr=2e-5 if options.train else 5e-4)

    for epoch in range(options.epochs):
        model.train()
        total = 0.0
        for batch in train_loader:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / len(train_loader):.3f}")

    print(classification_report(*predict(model, dev_loader, tags)))
    if options.output:
        model.save_pretrained(options.output)
        tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
