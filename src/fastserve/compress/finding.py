"""What a walk found at its stations, kept on disk: a walk that was interrupted begins after the last of them.

Tensors that are read back are mapped from their files, so that a model's new weights need no memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.grouped_tensor import GroupedTensor, Groups
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.compress.step import LayerError

_INDEX = "finding.json"  # written last: without it a finding is none


@dataclass(frozen=True, slots=True)
class Finding:
    """What a visitor gave at a station.

    Attributes:
        tensors: by name.
        layers, notes: what it added to those of the context.
    """

    tensors: Mapping[str, StoredTensor]
    layers: Sequence[LayerError] = ()
    notes: Sequence[str] = ()


def write_finding(folder: Path, finding: Finding) -> None:
    """Write a finding into a folder of its own, which has the finding whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = [_write(folder, str(n), tensor) for n, tensor in enumerate(finding.tensors.values())]
    index = {
        "names": list(finding.tensors),
        "tensors": entries,
        "layers": [asdict(layer) for layer in finding.layers],
        "notes": list(finding.notes),
    }
    partial = folder / f"{_INDEX}.partial"
    partial.write_text(json.dumps(index), encoding="utf-8")
    os.replace(partial, folder / _INDEX)


def read_finding(folder: Path) -> Finding | None:
    """The finding in a folder; None where there is none that is whole."""
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    tensors = (_read(folder, str(n), entry) for n, entry in enumerate(index["tensors"]))
    return Finding(
        dict(zip(index["names"], tensors, strict=True)),
        [LayerError(**layer) for layer in index["layers"]],
        index["notes"],
    )


def _write(folder: Path, stem: str, tensor: StoredTensor) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": tensor.name,
        "format": tensor.format.value,
        "shape": tensor.shape,
        "parts": ["data"],
    }
    parts: dict[str, NDArray[Any]] = {}
    if isinstance(tensor, GroupedTensor):
        codes, zeros, scales = tensor.groups(0, tensor.shape[0])
        of_column = tensor.group_of_column
        every = {"codes": codes, "zeros": zeros, "scales": scales, "group_of_column": of_column}
        parts = {name: part for name, part in every.items() if part is not None}
        entry |= {"bits": tensor.bits, "group_size": tensor.group_size}
    else:
        parts["data"] = tensor.data
    for name, part in parts.items():
        np.save(folder / f"{stem}-{name}.npy", part)
    return entry | {"parts": list(parts)}


def _read(folder: Path, stem: str, entry: Mapping[str, Any]) -> StoredTensor:
    parts: dict[str, Any] = {
        name: np.load(folder / f"{stem}-{name}.npy", mmap_mode="r") for name in entry["parts"]
    }
    name, stored_format, shape = entry["name"], TensorFormat(entry["format"]), tuple(entry["shape"])
    if "data" in parts:
        return StoredTensor(name, stored_format, shape, parts["data"])
    codes, zeros, scales = parts["codes"], parts.get("zeros"), parts["scales"]
    return GroupedTensor(
        name,
        stored_format,
        (shape[0], shape[1]),
        lambda begin, end: Groups(
            codes[begin:end], None if zeros is None else zeros[begin:end], scales[begin:end]
        ),
        lambda: zeros,
        bits=entry["bits"],
        group_size=entry["group_size"],
        group_of_column=parts.get("group_of_column"),
    )
