"""Every format, and everything that can be wrong with it: reported with file and line, never absorbed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fastserve.data import ProblemLog, ReadOptions, load_data
from fastserve.errors import DataError, OptionError

Write = Callable[[str, str | bytes], Path]


def lines(*rows: object) -> str:
    return "".join(
        f"{row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)}\n" for row in rows
    )


ROWS = [{"text": "Good, I think", "label": "yes"}, {"text": 'He said "no"', "label": "no"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", lines(*ROWS)),
        ("rows.json", json.dumps(ROWS, indent=1)),
        ("rows.json", json.dumps({"version": 1, "data": ROWS})),
        ("lines.json", lines(*ROWS)),
        ("rows.csv", 'text,label\n"Good, I think",yes\n"He said ""no""",no\n'),
        ("rows.csv", 'label,text\r\nyes,"Good, I think"\r\nno,"He said ""no"""\r\n'),
        ("rows.tsv", 'sentence\tcategory\nGood, I think\tyes\nHe said "no"\tno\n'),
    ],
)
def test_the_same_rows_come_from_every_format(write: Write, name: str, content: str) -> None:
    assert load_data(write(name, content), "text-classification") == ROWS


def test_parquet_gives_the_same_rows_with_their_numbers(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    rows = load_data(tmp_path / "rows.parquet", "text-classification")
    assert rows == ROWS
    assert [row.line for row in rows] == [1, 2]
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"broken.parquet: broken after row 0"):
        load_data(tmp_path / "broken.parquet", "text-classification")


def test_lines_are_counted_through_cells_that_hold_line_ends(write: Write) -> None:
    rows = load_data(write("rows.csv", 'text,label\n"one\ntwo",a\nthree,b\n'), "text-classification")
    assert [(row.line, row["text"]) for row in rows] == [(2, "one\ntwo"), (4, "three")]


def test_columns_are_named_where_there_is_no_header(write: Write) -> None:
    path = write("rows.tsv", 'x1\tham\tOk lar\nx2\tspam\tFree "entry\n')
    with pytest.raises(DataError, match=r"rows.tsv:1: the first line names no known column"):
        load_data(path, "text-classification")
    rows = load_data(path, "text-classification", options=ReadOptions(columns=("-", "label", "text")))
    assert rows == [{"label": "ham", "text": "Ok lar"}, {"label": "spam", "text": 'Free "entry'}]


def test_columns_of_one_name_are_a_list_and_a_letter_is_a_choice(write: Write) -> None:
    options = ReadOptions(columns=("question", "choices", "choices", "choices", "label"))
    rows = load_data(write("q.csv", "2+2?,3,4,5,B\n"), "multiple-choice", options=options)
    assert rows == [{"question": "2+2?", "choices": ["3", "4", "5"], "label": 1}]


def test_conll_columns_become_sentences(write: Write) -> None:
    text = "-DOCSTART- -X- O\n\n# sent_id = 1\nBonn NNP I-LOC\nis VB O\n \nIt PRP O\n"
    assert load_data(write("ner.conll", text), "token-classification") == [
        {"tokens": ["Bonn", "is"], "tags": ["B-LOC", "O"], "document": 1},
        {"tokens": ["It"], "tags": ["O"], "document": 1},
    ]


def test_a_sentence_with_a_broken_line_is_left_out_whole(write: Write) -> None:
    path = write("ner.conll", "a\tO\nb\nc\tO\n\nd\tO\n")
    with pytest.raises(DataError, match=r"ner.conll:2: 1 columns where 2 columns are"):
        load_data(path, "token-classification")
    rows = load_data(path, "token-classification", on_problem={"malformed": "drop"})
    assert rows == [{"tokens": ["d"], "tags": ["O"]}]


def test_parallel_text_pairs_lines_and_tells_where_one_file_ends(write: Write) -> None:
    source, target = write("a.en", "one\ntwo\nthree\n"), write("a.de", "eins\nzwei\n")
    with pytest.raises(DataError, match=r"a.de:3: the file ends before this line, .*a.en goes on"):
        load_data((source, target), "translation")
    rows = load_data((source, target), "translation", on_problem={"length-mismatch": "drop"})
    assert rows == [{"source": "one", "target": "eins"}, {"source": "two", "target": "zwei"}]


def test_parallel_lines_stay_together_where_one_of_them_is_left_out(write: Write) -> None:
    source = write("a.en", "é\nè\n".encode() + b"\xe9\n" + "ü\n".encode())
    target = write("a.de", "1\n2\n3\n4\n")
    rows = load_data((source, target), "translation", on_problem={"bad-bytes": "drop"})
    assert [(row["source"], row["target"]) for row in rows] == [("é", "1"), ("è", "2"), ("ü", "4")]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("line", [(1, "a"), (2, "b"), (5, "c")]),
        ("paragraph", [(1, "a\nb"), (5, "c")]),
        ("document", [(1, "a\nb\n\n\nc")]),
    ],
)
def test_plain_text_has_rows_of_the_unit(write: Write, unit: str, expected: list[tuple[int, str]]) -> None:
    rows = load_data(write("t.txt", "a\nb\n\n\nc\n"), "causal-lm", options=ReadOptions(unit=unit))
    assert [(row.line, row["text"]) for row in rows] == expected


def squad(answer: str, start: int) -> str:
    question = {"id": "q1", "question": "Who?", "answers": [{"text": answer, "answer_start": start}]}
    paragraph = {"context": "Ann met Ann and Bob.", "qas": [question]}
    return json.dumps({"version": "1", "data": [{"title": "T", "paragraphs": [paragraph]}]}, indent=1)


def test_squad_gives_a_row_for_each_question_with_the_line_of_its_id(write: Write) -> None:
    (row,) = load_data(write("qa.json", squad("Bob", 16)), "question-answering")
    assert row["answers"] == {"text": ["Bob"], "answer_start": [16]}
    assert (row["id"], row["title"]) == ("q1", "T")
    text = (Path(row.file)).read_text()
    assert '"q1"' in text.splitlines()[row.line - 1]


def test_an_answer_that_is_not_where_it_should_begin_is_reported_moved_or_dropped(write: Write) -> None:
    path = write("qa.json", squad("Ann", 7))
    with pytest.raises(
        DataError, match=r"qa.json:\d+: answer 'Ann' of question 'q1' is not at 7.*it is at 8"
    ):
        load_data(path, "question-answering")
    (row,) = load_data(path, "question-answering", on_problem={"answer-offset": "repair"})
    assert row["answers"]["answer_start"] == [8]
    assert load_data(path, "question-answering", on_problem={"answer-offset": "drop"}) == []


def test_an_answer_that_is_nowhere_cannot_be_repaired(write: Write) -> None:
    path = write("qa.json", squad("Eve", 0))
    with pytest.raises(DataError, match="it is nowhere"):
        load_data(path, "question-answering", on_problem={"answer-offset": "repair"})
    assert load_data(path, "question-answering", on_problem={"answer-offset": "repair-or-drop"}) == []


BAD_ROWS: list[tuple[str, str, str, Any, str]] = [
    (
        "malformed",
        "text-classification",
        "rows.jsonl",
        '{"text": "a", "label": }',
        "no JSON: Expecting value",
    ),
    ("malformed", "text-classification", "rows.jsonl", "[1]", "a row is an object, not an array"),
    (
        "malformed",
        "text-classification",
        "rows.jsonl",
        '{"text": "\\ud800", "label": "a"}',
        "half a surrogate",
    ),
    ("malformed", "text-classification", "rows.jsonl", '{"text": "a", "label": NaN}', "NaN is no number"),
    ("missing-field", "text-classification", "rows.jsonl", {"text": "a"}, "no field 'label'"),
    ("missing-field", "text-classification", "rows.jsonl", {"text": 3, "label": "a"}, "'text' is no text: 3"),
    ("empty-row", "text-classification", "rows.jsonl", {"text": " ", "label": "a"}, "field 'text' is empty"),
    ("empty-row", "text-classification", "rows.jsonl", "", "an empty line"),
    ("bad-label", "text-classification", "rows.jsonl", {"text": "a", "label": ""}, "label '' is empty"),
    (
        "bad-label",
        "text-classification",
        "rows.jsonl",
        {"text": "a", "label": None},
        "neither text nor a number",
    ),
    ("bad-label", "text-classification", "rows.jsonl", {"text": "a", "label": 1}, "label 1 is not text, as"),
    ("bad-label", "text-classification", "rows.jsonl", {"text": "a", "label": " yes"}, "has space around it"),
    (
        "length-mismatch",
        "token-classification",
        "rows.jsonl",
        {"tokens": ["a", "b"], "tags": ["O"]},
        "2 tokens and 1 tags",
    ),
    (
        "blank-token",
        "token-classification",
        "rows.jsonl",
        {"tokens": ["a", " "], "tags": ["O", "O"]},
        "token 1",
    ),
    (
        "bad-tag",
        "token-classification",
        "rows.jsonl",
        {"tokens": ["a"], "tags": ["E-X"]},
        "none of iob2",
    ),
    (
        "bad-span",
        "token-classification",
        "rows.jsonl",
        {"text": "abc", "entities": [{"start": 2, "end": 9, "label": "X"}]},
        r"entity 'X' \[2, 9\) is empty, or outside of 3 characters",
    ),
    (
        "bad-span",
        "token-classification",
        "rows.jsonl",
        {
            "text": "abc",
            "entities": [{"start": 0, "end": 2, "label": "X"}, {"start": 1, "end": 3, "label": "Y"}],
        },
        "overlaps",
    ),
    (
        "bad-span",
        "relation-extraction",
        "rows.jsonl",
        {"text": "a b", "head": {"start": 0, "end": 2}, "tail": {"start": 2, "end": 3}, "label": "r"},
        "begins or ends with space",
    ),
    (
        "bad-label",
        "multiple-choice",
        "rows.jsonl",
        {"question": "q", "choices": ["a", "b"], "label": 2},
        "none of",
    ),
    ("bad-role", "dialogue", "rows.jsonl", {"messages": [{"role": "boss", "content": "a"}]}, "role 'boss'"),
    ("missing-field", "dialogue", "rows.jsonl", {"messages": [{"role": "user", "content": "a"}]}, "to learn"),
]
GOOD_ROW: dict[str, Any] = {
    "text-classification": {"text": "good", "label": "yes"},
    "token-classification": {"tokens": ["a", "b"], "tags": ["B-X", "I-X"]},
    "relation-extraction": {
        "text": "a b",
        "head": {"start": 0, "end": 1},
        "tail": {"start": 2, "end": 3},
        "label": "r",
    },
    "multiple-choice": {"question": "q", "choices": ["a", "b"], "label": 1},
    "dialogue": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
}


@pytest.mark.parametrize(("kind", "task", "name", "row", "message"), BAD_ROWS)
def test_a_bad_row_is_fatal_with_file_and_line_or_dropped(
    write: Write, kind: str, task: str, name: str, row: object, message: str
) -> None:
    path = write(name, lines(GOOD_ROW[task], row, GOOD_ROW[task]))
    with pytest.raises(DataError, match=rf"{name}:2: .*{message}"):
        load_data(path, task, on_problem={kind: "error"})
    found = []
    log = ProblemLog({kind: "drop"}, sink=found.append)
    rows = load_data(path, task, log=log)
    assert [row.line for row in rows] == [1, 3]
    assert [(problem.kind, problem.line, problem.action) for problem in found] == [(kind, 2, "drop")]


def test_labels_are_held_to_those_that_are_named(write: Write) -> None:
    path = write("rows.jsonl", lines({"text": "a", "label": "yes"}, {"text": "b", "label": "YES "}))
    with pytest.raises(DataError, match=r"rows.jsonl:2: label 'YES ' is none of those named"):
        load_data(path, "text-classification", labels=["yes", "no"])
    rows = load_data(path, "text-classification", labels=["yes", "no"], on_problem={"bad-label": "repair"})
    assert [row["label"] for row in rows] == ["yes", "yes"]


def test_several_labels_are_checked_each(write: Write) -> None:
    path = write("rows.csv", 'text,labels\nx,"a, b"\ny,\n')
    rows = load_data(path, "text-classification")
    assert rows == [{"text": "x", "labels": ["a", "b"]}, {"text": "y", "labels": []}]


def test_mixed_tag_schemes_are_reported_for_each_sentence_that_is_not_of_the_files(write: Write) -> None:
    path = write("ner.conll", "a B-X\nb I-X\n\nc I-X\nd O\n\ne B-Y\nf O\n")
    with pytest.raises(DataError, match=r"ner.conll:4: tags of io in a file of iob2"):
        load_data(path, "token-classification")
    rows = load_data(path, "token-classification", on_problem={"mixed-tag-scheme": "repair"})
    assert [row["tags"] for row in rows] == [["B-X", "I-X"], ["B-X", "O"], ["B-Y", "O"]]


def test_tags_are_read_as_the_scheme_that_is_named_and_written_as_the_one_asked_for(write: Write) -> None:
    path = write("ner.conll", "a I-X\nb B-X\n")
    rows = load_data(path, "token-classification", tags_in="iob1", tag_scheme="iobes")
    assert rows[0]["tags"] == ["S-X", "S-X"]
    with pytest.raises(DataError, match="goes on after nothing"):
        load_data(path, "token-classification", tags_in="iob2")


def test_duplicate_ids_are_fatal_numbered_or_dropped(write: Write) -> None:
    path = write("rows.jsonl", lines(*({**ROWS[0], "id": key} for key in ("a", "b", "a", "a"))))
    with pytest.raises(DataError, match=r"rows.jsonl:3: id 'a' is that of .*rows.jsonl:1 too"):
        load_data(path, "text-classification")
    repaired = load_data(path, "text-classification", on_problem={"duplicate-id": "repair"})
    assert [row["id"] for row in repaired] == ["a", "b", "a-2", "a-3"]
    dropped = load_data(path, "text-classification", on_problem={"duplicate-id": "drop"})
    assert [row["id"] for row in dropped] == ["a", "b"]


def test_fatal_problems_are_gathered_where_the_log_is_asked_to(write: Write) -> None:
    path = write("rows.jsonl", lines("x", ROWS[0], "y"))
    log = ProblemLog(raises_at_once=False)
    assert load_data(path, "text-classification", log=log) == ROWS[:1]
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*; .*rows.jsonl:3: .*malformed=drop"):
        log.raise_fatal()


@pytest.mark.parametrize(
    ("on_problem", "message"),
    [
        ({"typo": "drop"}, "on_problem='typo' is unknown"),
        ({"bom": "ignore"}, "on_problem='ignore' is unknown"),
        ({"malformed": "repair"}, "malformed cannot be answered by 'repair'"),
    ],
)
def test_actions_that_are_not_there_are_refused(on_problem: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ProblemLog(on_problem)


def test_a_name_that_tells_no_format_is_refused(write: Write) -> None:
    with pytest.raises(DataError, match=r"rows.dat: the name tells no format"):
        load_data(write("rows.dat", "x"), "causal-lm")


def test_known_shapes_become_the_fields_of_their_task(write: Write) -> None:
    chat = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    (row,) = load_data(write("chat.json", json.dumps([chat])), "dialogue")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert row == {"messages": messages}
    alpaca = {"instruction": "Add", "input": "1 1", "output": "2"}
    (row,) = load_data(write("alpaca.json", json.dumps([alpaca])), "dialogue")
    assert [message["content"] for message in row["messages"]] == ["Add\n\n1 1", "2"]
    fewrel = {"P1": [{"tokens": ["a", "b", "c"], "h": ["x", "Q1", [[2]]], "t": ["y", "Q2", [[0, 1]]]}]}
    options = ReadOptions(key_field="label")
    (row,) = load_data(write("re.json", json.dumps(fewrel)), "relation-extraction", options=options)
    assert (row["head"], row["tail"]) == ({"start": 2, "end": 3}, {"start": 0, "end": 2})
    assert row["label"] == "P1"
    snips = {"Play": [{"data": [{"text": "play "}, {"text": "Bach", "entity": "artist"}]}]}
    (row,) = load_data(write("nlu.json", json.dumps(snips)), "token-classification")
    assert row == {"text": "play Bach", "entities": [{"start": 5, "end": 9, "label": "artist"}]}


REAL = [
    ("cls_banking77/train.csv", "text-classification", ReadOptions(), {}, 10003),
    ("cls_sms_spam/sms.tsv", "text-classification", ReadOptions(columns=("label", "text")), {}, 4434),
    ("ner_wnut17/train.conll", "token-classification", ReadOptions(), {}, 3394),
    ("ner_wnut17/dev.conll", "token-classification", ReadOptions(), {"bom": 1}, 1009),
    ("ner_sec_filings/train.conll", "token-classification", ReadOptions(), {}, 1164),
    ("re_semeval2010_task8/TRAIN_FILE.TXT", "relation-extraction", ReadOptions(), {}, 8000),
    (
        "re_fewrel/val_wiki.json",
        "relation-extraction",
        ReadOptions(key_field="label"),
        {"blank-token": 178},
        11200,
    ),
    ("qa_xquad/xquad.en.train.json", "question-answering", ReadOptions(), {}, 899),
    (
        "qa_cmrc2018/cmrc2018_trial.json",
        "question-answering",
        ReadOptions(),
        {"answer-offset": 5, "empty-row": 2},
        1000,
    ),
    ("sum_scitldr_A/dev.jsonl", "summarization", ReadOptions(), {}, 619),
    ("nlu_snips/train_RateBook_full.json", "token-classification", ReadOptions(), {}, 1956),
    (
        "dlg_crosswoz/val.jsonl",
        "dialogue",
        ReadOptions(roles={"usr": "user", "sys": "assistant"}),
        {},
        500,
    ),
]


@pytest.mark.parametrize(("name", "task", "options", "problems", "num_rows"), REAL)
def test_real_sets_are_read_and_what_is_wrong_with_them_is_found(
    shared_data: Path, name: str, task: str, options: ReadOptions, problems: dict[str, int], num_rows: int
) -> None:
    log = ProblemLog({"answer-offset": "repair", "blank-token": "repair"})
    rows = load_data(shared_data / name, task, options=options, log=log)
    assert {kind: log.count(kind) for kind, _ in log.counts} == problems
    assert len(rows) == num_rows


def test_halves_of_a_pair_in_a_real_set_are_no_utf_8_and_are_found(shared_data: Path) -> None:
    path = shared_data / "nlu_snips" / "train_PlayMusic_full.json"
    with pytest.raises(DataError, match=r"train_PlayMusic_full.json:9091: bytes ed at 39 are not utf-8"):
        load_data(path, "token-classification")
    rows = load_data(path, "token-classification", on_problem={"bad-bytes": "repair"})
    assert len(rows) == 2000
    assert sum("\ufffd" in row["text"] for row in rows) == 1


def test_a_sentence_of_which_a_line_is_left_out_for_its_bytes_goes_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.conll"
    path.write_bytes("Öl B-X\nÄ O\n\né B-X\n".encode() + b"\xff I-X\nb O\n\n" + "ü B-X\n".encode())
    rows = load_data(path, "token-classification", on_problem={"bad-bytes": "drop"})
    assert [(row["tokens"], row.line) for row in rows] == [(["Öl", "Ä"], 1), (["ü"], 8)]


@pytest.mark.parametrize(
    "record",
    [b'"a good\nb\xff line\nc",pos', b'"a g\xffod\nb\nc",pos', b'"a good\nb\nc\xff",pos', b"a\xff,pos"],
)
def test_a_record_goes_as_a_whole_where_a_line_of_it_goes_for_its_bytes(
    tmp_path: Path, record: bytes
) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"text,label\nfirst,neg\n" + record + b'\n"one, good",pos\nlast,neg\n')
    options = ReadOptions(encoding="utf-8")
    log = ProblemLog({"bad-bytes": "drop"})
    rows = load_data(path, "text-classification", options=options, log=log)
    assert [row["text"] for row in rows] == ["first", "one, good", "last"]
    assert log.counts == {("bad-bytes", "drop"): 1}
    with pytest.raises(DataError, match=r"rows.csv:\d: bytes ff at"):
        load_data(path, "text-classification", options=options)
