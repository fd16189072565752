"""Lines of text files: compressed or not, in whatever encoding, each with its number.

What is not plain UTF-8 is a problem that is reported, also where it is repaired.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from fastserve.data.problem import DROP, ERROR, ProblemLog
from fastserve.errors import DataError, OptionError, UnsupportedError

_BOM = "\ufeff"
_WIDE_BOMS = (  # in this order: the first bytes of UTF-32-LE are those of UTF-16-LE
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SAMPLE_BYTES = 200_000  # lines with bytes above 127 that an encoding is guessed from
_PIECE_BYTES = 2**20
_MAX_LINE_BYTES = 2**28

# What text is found in today. Code pages of DOS, EBCDIC and Macs, which any bytes fit, make guesses worse.
_CANDIDATES = [
    *("cp1252", "latin_1", "cp1250", "iso8859_2", "cp1251", "koi8_r", "cp1253", "cp1254", "cp1255", "cp1256"),
    *("gb18030", "big5", "shift_jis", "euc_jp", "euc_kr"),
]

_LATIN = ("cp1250", "cp1252", "cp1254", "iso8859_2", "latin_1")
_CODE_PAGE_OF_LANGUAGE = {
    **dict.fromkeys(("Polish", "Czech", "Slovak", "Hungarian", "Romanian", "Croatian", "Slovene"), "cp1250"),
    "Turkish": "cp1254",
}


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed where its name says so: .gz, .bz2, .xz, .zst.

    Raises:
        DataError: it is not there.
        UnsupportedError: Zstandard, and its library is not installed.
    """
    if not path.is_file():
        raise DataError(f"no file is at {path}", hint="give the path of a file")
    opener = _OPENERS.get(path.suffix.lower())
    return path.open("rb") if opener is None else cast(BinaryIO, opener(path))


def uncompressed_name(path: Path) -> str:
    """The name of a file without the ending of its compression: `rows.jsonl` for `rows.jsonl.gz`."""
    return path.stem if path.suffix.lower() in _OPENERS else path.name


def read_lines(
    path: Path, log: ProblemLog, *, encoding: str | None = None, left_out: set[int] | None = None
) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers from 1, without their ends (LF or CR LF).

    Without an `encoding`, the file is read to its end first, to see whether it is UTF-8; if not, its encoding
    is told by a byte order mark or guessed, and reported as a problem. Lines that the encoding does not have
    are problems each. Those that the log drops are left out; where they are parts of something longer, of
    which what is around them would be taken for all, `left_out` gets their numbers, and they are given too,
    with U+FFFD.

    Raises:
        DataError: the file is missing or broken, or the log finds a problem fatal.
        OptionError: no encoding has that name.
        UnsupportedError: the encoding must be guessed, and charset-normalizer is not installed.
    """
    name = encoding or _detect(path, log)
    try:
        codec = codecs.lookup(name).name
    except LookupError as error:
        raise OptionError(
            f"encoding={name!r} is unknown", hint="name one that Python has", option="encoding"
        ) from error
    raw_lines = _wide_lines(path, codec) if codec.startswith(("utf-16", "utf-32")) else _raw_lines(path)
    for line, raw in raw_lines:
        try:
            text = raw.decode(codec)
        except UnicodeDecodeError as error:
            message = f"bytes {raw[error.start : error.end].hex(' ')} at {error.start} are not {name}"
            if log.report("bad-bytes", str(path), line, message) in (ERROR, DROP):
                if left_out is None:
                    continue
                left_out.add(line)
            text = raw.decode(codec, errors="replace")
        if _BOM in text:
            where = "" if text.startswith(_BOM) else " within the line"
            log.report("bom", str(path), line, f"a byte order mark{where}")
            text = text.replace(_BOM, "")
        yield line, text.removesuffix("\n").removesuffix("\r")


def read_text(path: Path, log: ProblemLog, *, encoding: str | None = None) -> str:
    """A whole file as `read_lines` gives its lines."""
    return "\n".join(text for _, text in read_lines(path, log, encoding=encoding))


def _open_zstandard(path: Path) -> BinaryIO:
    try:
        import zstandard
    except ImportError as error:
        raise UnsupportedError(
            f"{path}: Zstandard needs a library: {error}", hint="pip install 'fastserve-llm[data]'"
        ) from error
    return cast(BinaryIO, io.BufferedReader(zstandard.open(path, "rb")))  # its own reads no lines


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zstandard,
}


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    line = 0
    with _reading(path, lambda: f"after line {line}") as file:
        while raw := file.readline(_MAX_LINE_BYTES):
            line += 1
            if len(raw) == _MAX_LINE_BYTES:
                raise DataError(f"{path}:{line}: the line is longer than {_MAX_LINE_BYTES} bytes")
            yield line, raw


def _wide_lines(path: Path, codec: str) -> Iterator[tuple[int, bytes]]:
    """Lines in an encoding whose line ends are more than a byte, each encoded anew without a mark."""
    with _reading(path, lambda: "within") as file:
        reader = codecs.getreader(codec)(file)
        try:
            for line, text in enumerate(_split(reader), start=1):
                yield line, text.encode(codec)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not {codec}: {error.reason}") from error


def _split(reader: codecs.StreamReader) -> Iterator[str]:
    """Lines by LF alone: iteration over a StreamReader breaks at U+2028 and the like."""
    rest = ""
    while piece := reader.read(_PIECE_BYTES):
        *lines, rest = (rest + piece).split("\n")
        yield from lines
    if rest:
        yield rest


@dataclass(slots=True)
class _Scan:
    """What reading a file as UTF-8 found."""

    num_good_lines: int = 0  # with characters above 127, all UTF-8
    num_bad_lines: int = 0
    first_bad_line: int = 0
    sample: bytes = b""


def _detect(path: Path, log: ProblemLog) -> str:
    """The encoding of a file; anything but UTF-8 is reported. A file whose lines are UTF-8 but for a few is
    UTF-8, with lines that are broken."""
    with _reading(path, lambda: "at its beginning") as file:
        start = file.read(4)
    for mark, name in _WIDE_BOMS:
        if start.startswith(mark):
            log.report("encoding", str(path), 1, f"the file is in {name}, by its byte order mark")
            return name
    if _is_utf8(path):
        return "utf-8"
    scan = _scan(path)
    if scan.num_good_lines > scan.num_bad_lines:
        return "utf-8"
    name = _guess(scan.sample)
    message = f"the file is not UTF-8 from here on; it is read as {name}"
    log.report("encoding", str(path), scan.first_bad_line, message)
    return name


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    num_bytes = 0
    with _reading(path, lambda: f"after {num_bytes} bytes") as file:
        try:
            while piece := file.read(_PIECE_BYTES):
                decoder.decode(piece)
                num_bytes += len(piece)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def _scan(path: Path) -> _Scan:
    scan = _Scan()
    for line, raw in _raw_lines(path):
        if raw.isascii():
            continue
        try:
            raw.decode("utf-8")
            scan.num_good_lines += 1
        except UnicodeDecodeError:
            scan.num_bad_lines += 1
            scan.first_bad_line = scan.first_bad_line or line
            if len(scan.sample) < _SAMPLE_BYTES:
                scan.sample += raw
    return scan


def _guess(sample: bytes) -> str:
    try:
        import charset_normalizer
    except ImportError as error:
        raise UnsupportedError(
            f"the encoding of a file that is not UTF-8 is guessed by a library: {error}",
            hint="name it with --encoding, or pip install 'fastserve-llm[data]'",
        ) from error
    matches = list(charset_normalizer.from_bytes(sample, cp_isolation=_CANDIDATES))
    spoken = [match for match in matches if match.coherence > 0] or matches  # a language was recognized
    if not spoken:
        return "latin_1"
    best = min(spoken, key=lambda match: match.chaos - match.coherence)
    if best.encoding not in _LATIN:
        return best.encoding
    # The library finds these alike, as they differ in a few letters; the language tells.
    wanted = _CODE_PAGE_OF_LANGUAGE.get(best.language, "cp1252")
    try:
        sample.decode(wanted)
    except UnicodeDecodeError:
        return best.encoding
    return wanted


@contextmanager
def _reading(path: Path, done: Callable[[], str]) -> Iterator[BinaryIO]:
    """A file that is open; what breaks meanwhile is a DataError that says how much was `done`."""
    with open_bytes(path) as file:
        try:
            yield file
        except _broken_errors() as error:
            raise DataError(f"{path}: broken {done()}: {error}") from error


def _broken_errors() -> tuple[type[Exception], ...]:
    errors: tuple[type[Exception], ...] = (EOFError, OSError, lzma.LZMAError, zlib.error)
    if "zstandard" in sys.modules:
        import zstandard

        errors = (*errors, zstandard.ZstdError)
    return errors
