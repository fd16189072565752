"""One number for each row, on disk: appended row by row, then mapped as an array."""

from __future__ import annotations

from array import array
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_BUFFERED = 2**16


class DiskColumn:
    """A column of numbers in a file. `typecode` is one of the module `array`: Q for 64 bits, d for floats.

    Numbers are appended until `array` maps them; nothing can be appended then.
    """

    def __init__(self, path: Path, typecode: str) -> None:
        self._path = path
        self._buffer = array(typecode)
        self._file = path.open("wb")
        self._num_written = 0

    def __len__(self) -> int:
        return self._num_written + len(self._buffer)

    def append(self, number: float) -> None:
        self._buffer.append(number)  # type: ignore[arg-type]
        if len(self._buffer) >= _BUFFERED:
            self._flush()

    def array(self) -> np.ndarray[Any, Any]:
        """The numbers, [rows], mapped from the file and writable."""
        import numpy as np

        self._flush()
        self._file.close()
        if not self._num_written:
            return np.zeros(0, self._buffer.typecode)
        return np.memmap(self._path, self._buffer.typecode, "r+")

    def _flush(self) -> None:
        if self._buffer:
            self._buffer.tofile(self._file)
            self._num_written += len(self._buffer)
            del self._buffer[:]

    def __enter__(self) -> DiskColumn:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
