from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from fastserve.data.problem import ProblemLog
from fastserve.data.text_file import read_lines
from fastserve.errors import DataError, OptionError

Write = Callable[[str, str | bytes], Path]

TEXT = "Zoë\nnaïve\n\n日本語"
LINES = [(1, "Zoë"), (2, "naïve"), (3, ""), (4, "日本語")]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", zstandard.compress),
    ],
)
def test_a_compressed_file_reads_as_the_plain_one(
    write: Write, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    path = write(f"lines.txt{suffix}", compress(TEXT.encode()))
    log = ProblemLog()
    assert list(read_lines(path, log)) == LINES
    assert not log.counts


@pytest.mark.parametrize("cut", [10, -6])
def test_a_compressed_file_that_is_cut_short_is_named(write: Write, cut: int) -> None:
    path = write("lines.txt.gz", gzip.compress(TEXT.encode())[:cut])
    with pytest.raises(DataError, match=r"lines.txt.gz: broken"):
        list(read_lines(path, ProblemLog()))


def test_a_byte_order_mark_is_taken_out_and_reported(write: Write) -> None:
    path = write("lines.txt", b"\xef\xbb\xbfone\ntwo\xef\xbb\xbf\n")
    log = ProblemLog()
    assert list(read_lines(path, log)) == [(1, "one"), (2, "two")]
    assert log.count("bom", "repair") == 2
    with pytest.raises(DataError, match=r"lines.txt:1: a byte order mark"):
        list(read_lines(path, ProblemLog({"bom": "error"})))


def test_latin_1_is_detected_and_reported_at_the_first_line_that_shows_it(write: Write) -> None:
    lines = ["plain ascii", "un café très bien fermé à l'été", "déjà vu, señor, où est la forêt"]
    path = write("lines.txt", "\n".join(lines).encode("latin-1"))
    found: list[str] = []
    log = ProblemLog(sink=lambda problem: found.append(str(problem)))
    assert [text for _, text in read_lines(path, log)] == lines
    assert len(found) == 1
    assert "lines.txt:2: the file is not UTF-8 from here on" in found[0]


def test_an_encoding_that_is_named_is_no_problem_and_one_that_does_not_exist_is_refused(write: Write) -> None:
    path = write("lines.txt", "café\n".encode("latin-1"))
    log = ProblemLog()
    assert list(read_lines(path, log, encoding="latin-1")) == [(1, "café")]
    assert not log.counts
    with pytest.raises(OptionError, match="encoding='klingon' is unknown"):
        list(read_lines(path, log, encoding="klingon"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-8-sig"])
def test_wide_encodings_are_told_by_their_mark(write: Write, encoding: str) -> None:
    mark = "\ufeff" if encoding == "utf-16-le" else ""
    path = write("lines.txt", (mark + "one\u2028half\r\n二\n").encode(encoding))
    assert list(read_lines(path, ProblemLog())) == [(1, "one\u2028half"), (2, "二")]


def test_chinese_in_gb18030_is_detected(write: Write) -> None:
    lines = ["太平天国私人便章考", "为什么要深入贯彻落实科学发展观", "网络结构优化设计模型及遗传算法"]
    path = write("lines.txt", "\n".join(lines).encode("gb18030"))
    log = ProblemLog()
    assert [text for _, text in read_lines(path, log)] == lines
    assert log.count("encoding", "repair") == 1


def test_a_few_broken_lines_of_utf_8_are_problems_each(write: Write) -> None:
    path = write("lines.txt", "é\nè\n".encode() + b"caf\xe9\n" + "ü\n".encode())
    with pytest.raises(DataError, match=r"lines.txt:3: bytes e9 at 3 are not utf-8"):
        list(read_lines(path, ProblemLog()))
    repaired = list(read_lines(path, ProblemLog({"bad-bytes": "repair"})))
    assert repaired == [(1, "é"), (2, "è"), (3, "caf\ufffd"), (4, "ü")]
    dropped = list(read_lines(path, ProblemLog({"bad-bytes": "drop"})))
    assert dropped == [(1, "é"), (2, "è"), (4, "ü")]


def test_lines_end_at_line_feeds_alone(write: Write) -> None:
    path = write("lines.txt", "a\x0bb\x85c\u2028d\r\ne\x1cf")
    assert [text for _, text in read_lines(path, ProblemLog())] == ["a\x0bb\x85c\u2028d", "e\x1cf"]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file is at .*absent.txt"):
        list(read_lines(tmp_path / "absent.txt", ProblemLog()))
