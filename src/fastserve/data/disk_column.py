"""One number for each row, on disk: appended row by row, then mapped as an array."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_BUFFERED = 2**16


class DiskColumn:
    """Numbers in a new file. `typecode` is one of the module `array`: Q for 64 bits, d for floats.

    Numbers are appended until `array` maps them. No file stays open meanwhile.
    """

    def __init__(self, path: Path, typecode: str) -> None:
        self._path = path
        self._buffer = array(typecode)
        self._num_written = 0
        path.write_bytes(b"")

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
        if not self._num_written:
            return np.zeros(0, self._buffer.typecode)
        return np.memmap(self._path, self._buffer.typecode, "r+")

    def _flush(self) -> None:
        if self._buffer:
            with self._path.open("ab") as file:
                self._buffer.tofile(file)
            self._num_written += len(self._buffer)
            del self._buffer[:]
