"""The whole way: files in, a folder out, nothing absorbed on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastserve.data import (
    AugmentOptions,
    CleanOptions,
    PrepareOptions,
    ReadOptions,
    Source,
    SplitOptions,
    Vocabulary,
    find_leaks,
    load_data,
    open_tokenizer,
    prepare,
)
from fastserve.errors import DataError, OptionError

Write = Callable[[str, str | bytes], Path]

ALL_TRAIN = SplitOptions(dev_ratio=0, test_ratio=0)


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def written(output: Path, name: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / f"{name}.jsonl").read_text().splitlines()]


def problems(output: Path) -> list[tuple[str, int, str]]:
    found = [json.loads(line) for line in (output / "problems.jsonl").read_text().splitlines()]
    return [(problem["kind"], problem["line"], problem["action"]) for problem in found]


def films(num_rows: int) -> list[dict[str, Any]]:
    return [
        {"text": f"Film {at} is {'good' if at % 2 else 'bad'}", "label": "pos" if at % 2 else "neg"}
        for at in range(num_rows)
    ]


def test_rows_are_split_and_everything_is_written(write: Write, tmp_path: Path) -> None:
    path, output = write("films.jsonl", lines(films(100))), tmp_path / "out"
    options = PrepareOptions("text-classification", split=SplitOptions(stratify=True))
    card = prepare([Source(path)], output, options)
    parts = {name: written(output, name) for name in ("train", "dev", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 80, "dev": 10, "test": 10}
    assert sorted(row["text"] for part in parts.values() for row in part) == sorted(
        row["text"] for row in films(100)
    )
    assert sum(row["label"] == "pos" for row in parts["dev"]) == 5
    assert json.loads((output / "labels.json").read_text()) == ["neg", "pos"]
    document = json.loads((output / "data.json").read_text())
    assert document["splits"]["train"]["labels"] == {"neg": 40, "pos": 40}
    assert document["sources"][0]["rows"] == 100
    assert card.to_document()["splits"] == document["splits"]
    assert load_data(output / "train.jsonl", "text-classification") == parts["train"]
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_the_same_files_and_seed_give_the_same_bytes(write: Write, tmp_path: Path) -> None:
    path = write("films.jsonl", lines(films(60)))
    options = PrepareOptions("text-classification", order="random", split=SplitOptions(seed=3))
    digests = set()
    for name in ("one", "two"):
        prepare([Source(path)], tmp_path / name, options)
        digests.add(json.loads((tmp_path / name / "data.json").read_text())["digest"])
    assert len(digests) == 1
    prepare(
        [Source(path)], tmp_path / "three", PrepareOptions("text-classification", split=SplitOptions(seed=4))
    )
    assert json.loads((tmp_path / "three" / "data.json").read_text())["digest"] not in digests


def test_equal_rows_go_and_those_that_are_labelled_otherwise_are_told(write: Write, tmp_path: Path) -> None:
    rows = [
        *films(4),
        {"text": "Film  0 is bad ", "label": "neg"},
        {"text": "Film 1 is good", "label": "neg"},
    ]
    options = PrepareOptions("text-classification", split=ALL_TRAIN)
    prepare([Source(write("films.jsonl", lines(rows)))], tmp_path / "out", options)
    assert problems(tmp_path / "out") == [("duplicate", 5, "drop"), ("conflicting-label", 6, "keep")]
    assert len(written(tmp_path / "out")) == 5


def test_rows_that_are_labelled_otherwise_are_not_parted(write: Write, tmp_path: Path) -> None:
    rows = [{"text": f"text {at // 2}", "label": str(at % 2)} for at in range(40)]
    options = PrepareOptions("text-classification", split=SplitOptions(dev_ratio=0.3, test_ratio=0.3))
    prepare([Source(write("rows.jsonl", lines(rows)))], tmp_path / "out", options)
    assert len(written(tmp_path / "out")) == 40  # all of them contested: train has them


def test_copies_that_are_kept_do_not_leak_from_train(write: Write, tmp_path: Path) -> None:
    text = "A sentence that is long enough to be told from others by its pieces"
    rows = [{"text": f"{text}, {'abcdefghij'[at % 10] * 20} {at // 30}", "n": at} for at in range(60)]
    rows += [{**row, "n": 60 + row["n"]} for row in rows[:20]]
    options = PrepareOptions(
        "causal-lm",
        near_duplicates=0.9,
        split=SplitOptions(dev_ratio=0.3, test_ratio=0.3),
        on_problem={"duplicate": "keep", "near-duplicate": "keep"},
    )
    rows.append({"text": "Something of its own, of which there is nothing else that is like it.", "n": 99})
    prepare([Source(write("rows.jsonl", lines(rows)))], tmp_path / "out", options)
    parts = {
        name: written(tmp_path / "out", name)
        for name in ("train", "dev", "test")
        if (tmp_path / "out" / f"{name}.jsonl").exists()
    }
    assert sum(map(len, parts.values())) == len(rows)
    assert find_leaks(parts, threshold=0.9) == []


def test_a_group_is_not_parted_by_rows_that_say_the_same(write: Write, tmp_path: Path) -> None:
    rows = [{"text": f"text {at}", "label": "x", "author": at // 4} for at in range(80)]
    rows += [{"text": f"text {at}", "label": "y", "author": 99 - at} for at in range(0, 40, 5)]
    options = PrepareOptions(
        "text-classification", split=SplitOptions(dev_ratio=0.2, test_ratio=0.2, group="author")
    )
    prepare([Source(write("rows.jsonl", lines(rows)))], tmp_path / "out", options)
    where = [{row["author"] for row in written(tmp_path / "out", name)} for name in ("train", "dev", "test")]
    assert sum(map(len, where)) == len({row["author"] for row in rows})
    assert all(where)


def test_rows_that_are_almost_equal_are_found(write: Write, tmp_path: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog near the river bank at noon today, they say."
    rows = [{"text": text}, {"text": "Something else that is nothing like it, of some length."}]
    rows += [
        {"text": text.replace("noon", "dusk")},
        {"text": text.replace("fox", "cat").replace("dog", "cow")},
    ]
    options = PrepareOptions("causal-lm", near_duplicates=0.75, split=ALL_TRAIN)
    prepare([Source(write("rows.jsonl", lines(rows)))], tmp_path / "out", options)
    assert problems(tmp_path / "out") == [("near-duplicate", 3, "drop")]


def test_what_dev_and_test_have_is_fatal_in_train_or_dropped_from_it(write: Write, tmp_path: Path) -> None:
    train, dev = write("train.jsonl", lines(films(6))), write("dev.jsonl", lines(films(2)))
    options = PrepareOptions("text-classification", split=ALL_TRAIN)
    with pytest.raises(
        DataError, match=r"train.jsonl:1: the text is that of .*dev.jsonl:1 too; .*train.jsonl:2"
    ):
        prepare([Source(train)], tmp_path / "out", options, dev=[Source(dev)])
    assert not (tmp_path / "out").exists()
    options = PrepareOptions("text-classification", split=ALL_TRAIN, on_problem={"split-overlap": "drop"})
    prepare([Source(train)], tmp_path / "out", options, dev=[Source(dev)])
    assert [row["text"] for row in written(tmp_path / "out", "dev")] == [row["text"] for row in films(2)]
    assert [row["text"] for row in written(tmp_path / "out")] == [row["text"] for row in films(6)[2:]]


def test_near_copies_across_splits_are_overlaps(write: Write, tmp_path: Path) -> None:
    text = "A sentence that is long enough to be told from others by its pieces, number one."
    train = write("train.jsonl", lines([{"text": text}, {"text": "Nothing like it at all, I should say."}]))
    test = write("test.jsonl", lines([{"text": text.replace("one", "two")}]))
    options = PrepareOptions(
        "causal-lm", near_duplicates=0.8, split=ALL_TRAIN, on_problem={"split-overlap": "drop"}
    )
    prepare([Source(train)], tmp_path / "out", options, test=[Source(test)])
    assert problems(tmp_path / "out") == [("split-overlap", 1, "drop")]
    assert len(written(tmp_path / "out", "test")) == len(written(tmp_path / "out")) == 1


def test_labels_that_training_lacks_are_fatal_or_dropped(write: Write, tmp_path: Path) -> None:
    train = write("train.jsonl", lines(films(4)))
    dev = write("dev.jsonl", lines([{"text": "So so", "label": "meh"}, {"text": "Fine", "label": "pos"}]))
    options = PrepareOptions("text-classification", split=ALL_TRAIN)
    with pytest.raises(DataError, match=r"dev.jsonl:1: label 'meh' is not in training.*unseen-label=drop"):
        prepare([Source(train)], tmp_path / "out", options, dev=[Source(dev)])
    options = PrepareOptions("text-classification", split=ALL_TRAIN, on_problem={"unseen-label": "drop"})
    prepare([Source(train)], tmp_path / "out", options, dev=[Source(dev)])
    assert written(tmp_path / "out", "dev") == [{"text": "Fine", "label": "pos"}]


def test_labels_are_of_one_type_across_files(write: Write, tmp_path: Path) -> None:
    one, other = write("a.jsonl", lines(films(4))), write("b.jsonl", lines([{"text": "x", "label": 1}]))
    with pytest.raises(DataError, match=r"b.jsonl:1: label 1 is not text, as the labels before are"):
        prepare([Source(one), Source(other)], tmp_path / "out", PrepareOptions("text-classification"))


def test_ids_are_numbered_across_files(write: Write, tmp_path: Path) -> None:
    paths = [
        write(f"{name}.jsonl", lines([{"text": name, "label": "x", "id": 7}])) for name in ("a", "b", "c")
    ]
    options = PrepareOptions("text-classification", split=ALL_TRAIN)
    with pytest.raises(DataError, match=r"b.jsonl:1: id 7 is that of .*a.jsonl:1 too"):
        prepare([Source(path) for path in paths], tmp_path / "out", options)
    options = PrepareOptions("text-classification", split=ALL_TRAIN, on_problem={"duplicate-id": "repair"})
    prepare([Source(path) for path in paths], tmp_path / "out", options)
    assert [row["id"] for row in written(tmp_path / "out")] == [7, "7-2", "7-3"]


def test_a_new_id_is_one_that_no_row_has(write: Write, tmp_path: Path) -> None:
    rows = [{"text": str(at), "id": key} for at, key in enumerate(["a", "a-2", "a"])]
    options = PrepareOptions("causal-lm", split=ALL_TRAIN, on_problem={"duplicate-id": "repair"})
    prepare([Source(write("rows.jsonl", lines(rows)))], tmp_path / "out", options)
    assert [row["id"] for row in written(tmp_path / "out")] == ["a", "a-2", "a-3"]


def test_tags_get_one_scheme_file_by_file(write: Write, tmp_path: Path) -> None:
    first = write("iob1.conll", "a I-X\nb I-X\n\nc I-Y\nd B-Y\n")
    second = write("iobes.conll", "e B-X\nf E-X\ng S-Y\n")
    options = PrepareOptions("token-classification", tag_scheme="bmes", split=ALL_TRAIN)
    card = prepare([Source(first), Source(second)], tmp_path / "out", options)
    assert [row["tags"] for row in written(tmp_path / "out")] == [
        ["B-X", "E-X"],
        ["S-Y", "S-Y"],
        ["B-X", "E-X", "S-Y"],
    ]
    assert card.splits["train"]["labels"] == {"Y": 3, "X": 2}
    assert [note.rsplit(" ", 1)[1] for note in card.notes if "tags" in note] == ["iob1", "iobes"]


def test_questions_about_one_context_stay_together(write: Write, tmp_path: Path) -> None:
    rows = [
        {
            "context": f"context {at // 5}",
            "question": f"q{at}",
            "answers": {"text": ["context"], "answer_start": [0]},
        }
        for at in range(100)
    ]
    path, output = write("qa.jsonl", lines(rows)), tmp_path / "out"
    prepare([Source(path)], output, PrepareOptions("question-answering"))
    where = [{row["context"] for row in written(output, name)} for name in ("train", "dev", "test")]
    assert sum(map(len, where)) == 20
    assert all(where)


def test_only_training_rows_are_augmented_and_the_card_counts_them(write: Write, tmp_path: Path) -> None:
    options = PrepareOptions(
        "text-classification",
        augment=AugmentOptions(synonyms={"film": ["movie"]}, synonym_ratio=1),
        split=SplitOptions(dev_ratio=0.2, test_ratio=0),
    )
    card = prepare([Source(write("films.jsonl", lines(films(20))))], tmp_path / "out", options)
    assert (card.splits["train"]["rows"], card.splits["train"]["augmented"]) == (32, 16)
    assert not any("augmented" in row for row in written(tmp_path / "out", "dev"))
    assert {row["text"].split()[0] for row in written(tmp_path / "out") if "augmented" in row} == {"Movie"}


def test_rows_come_in_the_order_asked_for(write: Write, tmp_path: Path) -> None:
    rows = [{"text": "x" * (1 + at * 7 % 30)} for at in range(30)]
    path = write("rows.jsonl", lines(rows))
    orders = {}
    for order in ("input", "length", "random"):
        options = PrepareOptions("causal-lm", order=order, split=ALL_TRAIN)
        prepare([Source(path)], tmp_path / order, options)
        orders[order] = [len(row["text"]) for row in written(tmp_path / order)]
    assert orders["input"] == [len(row["text"]) for row in rows]
    assert orders["length"] == sorted(orders["input"])
    assert sorted(orders["random"]) == orders["length"]
    assert orders["random"] not in (orders["input"], orders["length"])


def test_a_tokenizer_is_trained_and_its_tokens_are_packed(write: Write, tmp_path: Path) -> None:
    rows = [{"text": f"the story of number {at}, told again"} for at in range(200)]
    options = PrepareOptions("causal-lm", train_tokenizer="bpe", vocab_size=300, pack=64, split=ALL_TRAIN)
    card = prepare([Source(write("rows.jsonl", lines(rows)))], tmp_path / "out", options)
    tokenizer = open_tokenizer(tmp_path / "out" / "tokenizer")
    packs = written(tmp_path / "out", "train.packed")
    assert all(len(pack["input_ids"]) <= 64 for pack in packs)
    texts = tokenizer.decode(
        [token for pack in packs for token in pack["input_ids"]], skip_special_tokens=False
    )
    assert sorted(texts.removesuffix("<|endoftext|>").split("<|endoftext|>")) == sorted(
        row["text"] for row in rows
    )
    assert "filled" in card.outputs["train.packed.jsonl"]


def test_a_vocabulary_has_the_words_of_segmented_text(write: Write, tmp_path: Path) -> None:
    path = write("rows.tsv", "text\tlabel\n我来到北京清华大学\ta\n北京很大\tb\n")
    options = PrepareOptions("text-classification", segment="jieba", vocab_size=50, split=ALL_TRAIN)
    prepare([Source(path)], tmp_path / "out", options)
    assert written(tmp_path / "out")[0]["text"] == "我 来到 北京 清华大学"
    vocabulary = Vocabulary.load(tmp_path / "out" / "vocabulary.json")
    assert vocabulary.words[4] == "北京"
    assert "清华大学" in vocabulary.ids


def test_fatal_problems_are_told_together_and_nothing_is_written(write: Write, tmp_path: Path) -> None:
    path = write("rows.jsonl", "x\n" + lines(films(2)) + '{"text": "a", "label": ""}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:1: no JSON.*; .*rows.jsonl:4: label '' is empty"):
        prepare([Source(path)], tmp_path / "out", PrepareOptions("text-classification"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


def test_nothing_left_is_an_error(write: Write, tmp_path: Path) -> None:
    path = write("rows.jsonl", lines([{"text": " ", "label": "a"}]))
    with pytest.raises(DataError, match="no row is left for training"):
        prepare([Source(path)], tmp_path / "out", PrepareOptions("text-classification"))


def test_a_folder_of_an_earlier_run_is_replaced_and_any_other_is_left_alone(
    write: Write, tmp_path: Path
) -> None:
    path, output = write("films.jsonl", lines(films(10))), tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("keep me")
    with pytest.raises(DataError, match=r"out is there already, and no data.json is in it"):
        prepare([Source(path)], output, PrepareOptions("text-classification"))
    assert (output / "mine.txt").read_text() == "keep me"
    (output / "mine.txt").unlink()
    for _ in range(2):
        prepare([Source(path)], output, PrepareOptions("text-classification", split=ALL_TRAIN))
    assert len(written(output)) == 10


class _Tags(HTMLParser):
    """Checks that what opens is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_card_tells_what_was_found_as_text_and_as_a_page(write: Write, tmp_path: Path) -> None:
    rows = [*films(20), films(1)[0], {"text": "  <script>alert(1)</script>", "label": "<b>"}]
    options = PrepareOptions(
        "text-classification", clean=CleanOptions(max_length=40), read=ReadOptions(), split=ALL_TRAIN
    )
    prepare([Source(write("films.jsonl", lines(rows)))], tmp_path / "out", options)
    text = (tmp_path / "out" / "card.txt").read_text()
    page = (tmp_path / "out" / "card.html").read_text()
    for part in ("films.jsonl", "duplicate", "films.jsonl:21", "max_length", "characters"):
        assert part in text
        assert part in page
    assert "<script>" not in page
    assert "&lt;b&gt;" in page
    parser = _Tags()
    parser.feed(page)
    assert parser.open == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"task": "translation", "augment": AugmentOptions(noise_ratio=0.1)},
            "translation cannot be augmented",
        ),
        ({"task": "causal-lm", "pack": 128}, "packing and segmenting by a tokenizer need one"),
        ({"task": "text-classification", "pack": 128, "train_tokenizer": "bpe"}, "is not packed"),
        ({"task": "question-answering", "segment": "words"}, "answers are told by characters"),
        ({"task": "poetry"}, "task='poetry' is unknown"),
        (
            {"task": "causal-lm", "segment": "tokenizer", "train_tokenizer": "bpe"},
            "before a tokenizer is trained",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PrepareOptions(**options)


CORPUS = """
import resource, sys
from pathlib import Path
from fastserve.data import PrepareOptions, Source, SplitOptions, prepare
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
options = PrepareOptions("causal-lm", order="length", memory_bytes=2**20, near_duplicates=0.9,
                         split=SplitOptions(dev_ratio=0, test_ratio=0))
prepare([Source(Path(sys.argv[1]))], Path(sys.argv[2]), options)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_a_corpus_many_times_the_memory_is_sorted_and_rid_of_duplicates(tmp_path: Path) -> None:
    corpus, output = tmp_path / "corpus.jsonl", tmp_path / "out"
    with corpus.open("w") as file:
        for at in range(8_000):
            number = at * 7919 % 6_000  # a quarter is there twice
            file.write(json.dumps({"text": f"{number} " + f"{number * number} " * (number % 300)}) + "\n")
    assert corpus.stat().st_size > 8 * 2**20
    run = subprocess.run(
        [sys.executable, "-c", CORPUS, corpus, output], capture_output=True, check=True, text=True
    )
    assert int(run.stdout) < 12 * 2**20  # a run of all lines takes 16 MB
    sizes = [len(line) for line in (output / "train.jsonl").read_bytes().splitlines()]
    assert sizes == sorted(sizes)
    assert sum(kind == "duplicate" for kind, _, _ in problems(output)) == 2_000
