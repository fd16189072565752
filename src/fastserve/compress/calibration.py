"""Calibration: a model's own matrices meet what they multiply with, station by station, in bounded memory."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.checkpoint.tensor import StoredTensor
from fastserve.compress.batch_state import BATCH_TOKENS, StateStore, make_batches, run_nodes
from fastserve.compress.calibration_text import calibration_tokens as calibration_tokens
from fastserve.compress.finding import Finding, read_finding, write_finding
from fastserve.compress.station import Station, find_stations
from fastserve.compress.step import Context, WorkingModel
from fastserve.errors import CheckpointError, DataError
from fastserve.graph.node import Graph, MixtureOfExperts, Parameter
from fastserve.models.family import arrange_tensors, build_graph, read_config
from fastserve.models.matrices import find_matrices
from fastserve.models.parameters import check_parameters

STATE_BYTES = 2**30  # of values between two stations that stay in memory; the others go to disk


class Visitor(Protocol):
    """Who looks at a model's matrices at work, and may change them."""

    @property
    def key(self) -> str:
        """What it does, all options included: what a walk has found is kept under it."""

    def observe(self, station: Station, x: torch.Tensor) -> None:
        """Some rows [rows, in] of what the station's matrices multiply with, float32; only to be read, and
        only during the call."""

    def finish(self, station: Station) -> Mapping[str, StoredTensor]:
        """All rows have been observed: new tensors, by name, for everything after the station to see.

        Tensors under names that the model does not have are findings, which `visit` gives back.
        """


def walk(
    model: WorkingModel, context: Context, visitor: Visitor, *, names: Collection[str] | None = None
) -> WorkingModel:
    """Run a model on `context.calibration`, and have a visitor change its matrices on the way.

    Args:
        names: of matrices; stations that have none of them are passed by. None: all linears and the head.

    Returns:
        The model with the tensors that the visitor gave. They may be mapped from files in `context.scratch`.

    Raises:
        DataError: there are no calibration tokens.
        CheckpointError: weights, or what the model computes, are not finite.
    """
    return model.with_tensors(visit(model, context, visitor, names=names))


def visit(
    model: WorkingModel,
    context: Context,
    visitor: Visitor,
    *,
    names: Collection[str] | None = None,
    state_bytes: int = STATE_BYTES,
) -> dict[str, StoredTensor]:
    """All tensors that a visitor gave along a walk, by name. Arguments and errors as of `walk`.

    A walk that was interrupted goes on where it was, where model, visitor and calibration are the same and
    `context.scratch` is kept: what was found is read, and not observed again.
    """
    if not context.calibration:
        raise DataError("there is no calibration text", hint="name a file of text with --calibration")
    graph = graph_of(model)
    found = find_matrices(model.checkpoint)
    known = frozenset(found.linears) | frozenset(found.tables)
    stations = find_stations(graph, known if names is None else known.intersection(names))
    if any(isinstance(node, MixtureOfExperts) for node in graph.nodes):
        context.notes.append("matrices of experts are not calibrated: they are left as they are")
    folder = context.scratch / f"walk-{_digest(model, visitor, stations, context.calibration)}"
    with torch_threads(context.threads), torch.no_grad():
        try:
            return _Walk(model, context, graph, folder, state_bytes).run(stations, visitor)
        finally:
            shutil.rmtree(folder / "states", ignore_errors=True)


class _Walk:
    """One walk under way: where the batches are in the graph, and the model as it is by now."""

    def __init__(
        self, model: WorkingModel, context: Context, graph: Graph, folder: Path, state_bytes: int
    ) -> None:
        self._model = model
        self._context = context
        self._graph = graph
        self._folder = folder
        self._position = 0
        self._batches = make_batches(context.calibration, num_tokens=BATCH_TOKENS)
        self._states = StateStore(folder / "states", state_bytes)

    def run(self, stations: Seq[Station], visitor: Visitor) -> dict[str, StoredTensor]:
        tensors: dict[str, StoredTensor] = {}
        known = self._read_findings(len(stations))
        for station in stations:
            self._context.progress("calibrating", station.index, len(stations))
            if station.index < len(known):
                finding = known[station.index]
                if len(known) < len(stations):  # later ones need the batches
                    self._advance(station, None)
                self._context.layers.extend(finding.layers)
                self._context.notes.extend(finding.notes)
            else:
                station = replace(station, values=self._matrices(station))
                self._advance(station, visitor)
                finding = self._finish(station, visitor)
            tensors |= finding.tensors
            self._model = self._model.with_tensors(finding.tensors)
        self._context.progress("calibrating", len(stations), len(stations))
        return tensors

    def _advance(self, station: Station, visitor: Visitor | None) -> None:
        """Take all batches to a station, by the model as it is now."""
        nodes = self._graph.nodes[self._position : station.position]
        weights = self._weights({parameter for node in nodes for parameter in node.parameters()})
        for index, batch in enumerate(self._batches):
            values = self._states.take(index)
            run_nodes(self._graph, self._position, station.position, batch, weights, values)
            if visitor is not None:
                visitor.observe(
                    station, _finite(values[station.x], f"what {station.names[0]} multiplies with")
                )
            self._states.put(index, values)
        self._position = station.position

    def _finish(self, station: Station, visitor: Visitor) -> Finding:
        """What the visitor gives, kept on disk and read back from there."""
        context = self._context
        num_layers, num_notes = len(context.layers), len(context.notes)
        tensors = visitor.finish(station)
        folder = self._finding_folder(station.index)
        write_finding(folder, Finding(tensors, context.layers[num_layers:], context.notes[num_notes:]))
        finding = read_finding(folder)
        assert finding is not None
        return finding

    def _read_findings(self, num_stations: int) -> list[Finding]:
        """Those of the first stations that an earlier walk came by."""
        found = (read_finding(self._finding_folder(index)) for index in range(num_stations))
        return list(_present(found))

    def _finding_folder(self, index: int) -> Path:
        return self._folder / f"{index:05}"

    def _matrices(self, station: Station) -> dict[str, torch.Tensor]:
        weights = self._weights({node.weight for node in station.nodes})
        return {node.weight.names[0]: weights[node.weight] for node in station.nodes}

    def _weights(self, parameters: Collection[Parameter]) -> dict[Parameter, torch.Tensor]:
        arranged = arrange_tensors(read_config(self._model.config), self._model.tensors)
        return {
            parameter: _finite(torch.from_numpy(to_f32(arranged[parameter.names[0]])), parameter.names[0])
            for parameter in parameters
        }


def graph_of(model: WorkingModel) -> Graph:
    """As its family builds it, of a model whose tensors fit.

    Raises:
        CheckpointError, UnsupportedError: the model is none that we have, or its tensors do not fit it.
    """
    config = read_config(model.config)
    arranged = arrange_tensors(config, model.tensors)
    graph = build_graph(config, arranged.keys())
    check_parameters(graph, arranged)
    return graph


def _finite(values: torch.Tensor, name: str) -> torch.Tensor:
    """
    Raises:
        CheckpointError: values are NaN or infinite.
    """
    if torch.isfinite(values.sum()):  # a sum is finite where all are, and much sooner made
        return values
    num_odd = int((~torch.isfinite(values)).sum())
    if num_odd:
        raise CheckpointError(
            f"{name} has {num_odd} numbers of {values.numel()} that are NaN or infinite",
            hint="take the model from its source again, or look at the steps before this one",
        )
    return values


def _present(found: Iterable[Finding | None]) -> Iterator[Finding]:
    """Those before the first that is missing."""
    for finding in found:
        if finding is None:
            return
        yield finding


def _digest(model: WorkingModel, visitor: Visitor, stations: Seq[Station], calibration: Seq[Seq[int]]) -> str:
    """Of all that decides what a walk finds."""
    digest = hashlib.sha256()
    names = [station.names for station in stations]
    digest.update(json.dumps([visitor.key, names, dict(model.config)], sort_keys=True, default=str).encode())
    for sequence in calibration:
        digest.update(np.asarray([len(sequence), *sequence], np.int64).data)
    for name, tensor in model.tensors.items():
        digest.update(f"{name} {tensor.format} {tensor.shape}".encode())
        grouped = tensor.groups(0, tensor.shape[0]) if isinstance(tensor, GroupedTensor) else None
        for part in grouped or (tensor.data,):
            digest.update(b"" if part is None else np.ascontiguousarray(part).data)
    return digest.hexdigest()[:32]


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
