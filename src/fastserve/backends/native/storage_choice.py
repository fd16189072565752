"""How sparse matrices are stored: by what was measured on this machine, once, and is kept in the store.

Results have the same bits whatever is chosen (docs/kernels-sparse.md), so that only speed and memory depend
on it. The file is JSON: by machine and kind of weights, the speeds of each storage as a multiple of dense
weights'.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np

import fastserve._native as _native
from fastserve.backends.native.storage_speed import measure_speeds
from fastserve.backends.native.weight_scheme import SPARSE_STORAGES, Storage, WeightScheme
from fastserve.hub.location import store_home
from fastserve.types import JsonObject

logger = logging.getLogger(__name__)

ZEROS = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95)  # shares at which speeds are measured
# Rows at which speeds are measured, and how much they count: the decoding of one sequence, where memory is
# waited for, more than that of a few and than prompts.
ROWS: Mapping[int, float] = {1: 0.7, 8: 0.15, 64: 0.15}
# Shares of zeros below which nothing is measured: rounding alone makes fewer, and a bitmask saves little.
LEAST_ZEROS: Mapping[str, float] = {"int8": 0.15, "int4": 0.25}
_KERNELS = f"kernels {_native.PACKED_LAYOUT[:12]}"  # when they change, speeds are measured again
_CSR_FROM = 0.6  # takes more memory than dense weights below

Speeds = Mapping[Storage, Mapping[int, Sequence[float]]]
"""By storage and number of rows, the speeds at the last of ZEROS, as many as were measured."""


@dataclass(frozen=True, slots=True)
class SpeedTable:
    """What was measured of one kind of weights on one machine."""

    speeds: Speeds

    def choose(self, share_of_zeros: float) -> Storage:
        """The storage with the largest geometric mean of speeds, weighted as ROWS says. Sparse weights that
        are as fast as dense ones take less memory."""
        scores: dict[Storage, float] = {name: self._score(name, share_of_zeros) for name in self.speeds}
        scores["dense"] = 1.0
        return max(scores, key=scores.__getitem__)

    def break_evens(self) -> list[tuple[float, Storage]]:
        """From which shares of zeros on, in whole percents, which storage is chosen; dense weights before."""
        found: list[tuple[float, Storage]] = [(0.0, "dense")]
        for percent in range(math.ceil(100 * ZEROS[0]), 101):
            storage = self.choose(percent / 100)
            if storage != found[-1][1]:
                found.append((percent / 100, storage))
        return found[1:]

    def _score(self, storage: Storage, share_of_zeros: float) -> float:
        by_rows = self.speeds[storage]
        shares = ZEROS[-len(next(iter(by_rows.values()))) :]
        if share_of_zeros < shares[0]:
            return 0.0
        logs = [
            weight
            * float(
                np.interp(
                    share_of_zeros, shares, _never_falling([math.log(speed) for speed in by_rows[rows]])
                )
            )
            for rows, weight in ROWS.items()
        ]
        return math.exp(sum(logs))

    def to_json(self) -> JsonObject:
        return {
            name: {str(rows): list(speeds) for rows, speeds in by_rows.items()}
            for name, by_rows in self.speeds.items()
        }

    @classmethod
    def from_json(cls, value: object) -> SpeedTable:
        """
        Raises:
            ValueError: it is no table.
        """
        if not isinstance(value, dict) or not value:
            raise ValueError("a table of speeds is no object")
        speeds: dict[Storage, dict[int, list[float]]] = {}
        for name, by_rows in value.items():
            if name not in get_args(Storage) or not isinstance(by_rows, dict):
                raise ValueError(f"no storage is named {name!r}")
            if sorted(by_rows) != sorted(map(str, ROWS)):
                raise ValueError(f"{name} was measured at other rows than {list(ROWS)}")
            speeds[name] = {rows: _check_speeds(by_rows[str(rows)]) for rows in ROWS}
            if len({len(row) for row in speeds[name].values()}) != 1:
                raise ValueError(f"{name} was not measured at the same shares for all rows")
        return cls(speeds)


@dataclass(frozen=True, slots=True)
class StorageChoice:
    """Chooses storages by the speeds of one machine, which it measures where the file lacks them. Nothing
    that goes wrong on the disk fails a run: it is logged."""

    machine: str  # a name that tells processors apart
    path: Path = field(default_factory=lambda: store_home() / "storage-speed.json")
    # What this object measured or read, by _key and kind: one model asks for every matrix, wherever it is
    # kept.
    _known: dict[tuple[str, str], SpeedTable] = field(default_factory=dict, repr=False, compare=False)

    def choose(self, runtime: _native.Runtime, scheme: WeightScheme, share_of_zeros: float) -> Storage:
        """How a matrix of this scheme with so many zeros is stored."""
        if share_of_zeros < LEAST_ZEROS[scheme.format]:
            return "dense"
        kind = kind_of(scheme)
        key = (self._key(runtime), kind)
        if key not in self._known:
            self._known[key] = self.tables(runtime).get(kind) or self._measure(runtime, scheme)
        return self._known[key].choose(share_of_zeros)

    def tables(self, runtime: _native.Runtime) -> dict[str, SpeedTable]:
        """What the file has for these kernels and threads of this machine, by the kind of weights."""
        try:
            tables = self._read().get(self._key(runtime), {})
            return {kind: SpeedTable.from_json(table) for kind, table in tables.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError) as error:
            logger.info("%s cannot be used, speeds are measured again: %s", self.path, error)
            return {}

    def _measure(self, runtime: _native.Runtime, scheme: WeightScheme) -> SpeedTable:
        logger.info("measuring how fast sparse %s weights are on this machine, once", kind_of(scheme))
        speeds: dict[Storage, dict[int, list[float]]] = {}
        for zeros in ZEROS:
            storages = [name for name in SPARSE_STORAGES if name != "csr" or zeros >= _CSR_FROM]
            for name, by_rows in measure_speeds(
                runtime, scheme, zeros, list(ROWS), storages=storages
            ).items():
                for rows, speed in by_rows.items():
                    speeds.setdefault(name, {}).setdefault(rows, []).append(round(speed, 3))
        table = SpeedTable(speeds)
        self._keep(runtime, kind_of(scheme), table)
        return table

    def _keep(self, runtime: _native.Runtime, kind: str, table: SpeedTable) -> None:
        try:
            try:
                content = self._read()
            except (FileNotFoundError, ValueError):
                content = {}
            of_machine = content.get(self._key(runtime))
            kept = of_machine if isinstance(of_machine, dict) else {}
            content = {key: tables for key, tables in content.items() if key.endswith(_KERNELS)}
            content[self._key(runtime)] = {**kept, kind: table.to_json()}
            _write(self.path, content)
        except OSError as error:
            logger.info("speeds of sparse weights are not kept: %s", error)

    def _read(self) -> JsonObject:
        """Raises OSError, ValueError."""
        content = json.loads(self.path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        return content

    def _key(self, runtime: _native.Runtime) -> str:
        return f"{self.machine}, {runtime.isa}, {runtime.num_threads} threads, {_KERNELS}"


def kind_of(scheme: WeightScheme) -> str:
    """What the speed of weights depends on: their format, and columns that share scales (0: all).

    >>> from fastserve.backends.native.weight_scheme import SCHEMES
    >>> kind_of(SCHEMES["int4:g128"])
    'int4 g128 x64'
    """
    return f"{scheme.format} g{scheme.group_size} x{scheme.activation_group_size}"


def _never_falling(values: Sequence[float]) -> list[float]:
    """The nearest numbers that never fall, by least squares: more zeros are never slower, whatever noise says
    (pool adjacent violators: Ayer et al., Ann. Math. Statist. 26, 1955).

    >>> _never_falling([1.0, 3.0, 2.0, 4.0])
    [1.0, 2.5, 2.5, 4.0]
    """
    pools: list[list[float]] = []
    for value in values:
        pools.append([float(value)])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return [float(np.mean(pool)) for pool in pools for _ in pool]


def _check_speeds(values: object) -> list[float]:
    if not isinstance(values, list) or not 0 < len(values) <= len(ZEROS):
        raise ValueError(f"{values!r} are no speeds")
    if not all(isinstance(value, int | float) and 0 < value < math.inf for value in values):
        raise ValueError(f"{values!r} are no speeds")
    return [float(value) for value in values]


def _write(path: Path, content: JsonObject) -> None:
    """Beside its place, and renamed into it: a reader finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
