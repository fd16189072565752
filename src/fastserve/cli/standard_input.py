"""What is typed or piped in, as text: a line that is none is an error of that line alone."""

from __future__ import annotations

import sys
from contextlib import suppress

from fastserve.errors import OptionError


def read_text() -> str:
    """All of standard input, line breaks as \\n.

    Raises:
        OptionError: it is not text in the encoding of standard input.
    """
    return _decode(sys.stdin.buffer.read(), "standard input").replace("\r\n", "\n")


class LineReader:
    """Reads line by line, with history and keys for editing on a terminal."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdin.isatty()
        self._num_lines = 0
        if self.is_terminal:
            with suppress(ImportError):
                import readline  # noqa: F401 - gives input() its history and keys

    def read_line(self) -> str | None:
        """The next line without its break; None at the end.

        Raises:
            OptionError: it is not text in the encoding of standard input. The next call reads on behind it.
            KeyboardInterrupt: Ctrl-C was typed instead of a line.
        """
        self._num_lines += 1
        if not self.is_terminal:
            # Bytes, as text would be decoded in blocks of many lines, all lost where one of them is bad.
            data = sys.stdin.buffer.readline()
            return _decode(data, f"line {self._num_lines} of standard input").rstrip("\r\n") if data else None
        try:
            return input("> ")
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise _to_option_error(error, "what was typed") from error


def _decode(data: bytes, what: str) -> str:
    try:
        return data.decode(sys.stdin.encoding)
    except UnicodeDecodeError as error:
        raise _to_option_error(error, what) from error


def _to_option_error(error: UnicodeDecodeError, what: str) -> OptionError:
    return OptionError(
        f"{what} is not valid {error.encoding.upper()}: "
        f"byte 0x{error.object[error.start]:02x} at position {error.start}",
        hint="convert it first, or name its encoding in PYTHONIOENCODING",
    )
