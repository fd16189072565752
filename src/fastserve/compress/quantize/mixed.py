"""The step `mixed`: every matrix gets as many bits as its sensitivity is worth, within a size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Literal

from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.compress.calibration import graph_of, torch_threads
from fastserve.compress.quantize.gptq import Solver
from fastserve.compress.quantize.grid import BITS, Grid, quantize
from fastserve.compress.quantize.sensitivity import measure_sensitivity
from fastserve.compress.quantize.step import find_quantizable, read_matrix, round_matrices, solve_matrices
from fastserve.compress.station import find_stations
from fastserve.compress.step import Context, Need, Targets, WorkingModel
from fastserve.errors import DataError, OptionError
from fastserve.option import check_choice, check_integer, check_number


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """The step `mixed`. Matrices that multiply with the same values have the same bits, as the runtime stacks
    them.

    Attributes:
        bits_per_weight: most that all matrices may take together, scales and zero points included, over the
            number of weights.
        choices: of bits.
        method: how matrices are quantized once their bits are known: `gptq` or `rtn`.
        group_size, symmetric, scale_format, scale_search, misfit: as of `Grid`; 8 bits have a scale for each
            row.
        num_sequences: of the calibration text that sensitivities are measured on.
        targets: which matrices.
    """

    bits_per_weight: float = 4.25
    choices: tuple[int, ...] = BITS
    method: Literal["gptq", "rtn"] = "gptq"
    group_size: int = 64
    symmetric: bool = True
    scale_format: Literal["bf16", "f16"] = "bf16"
    scale_search: bool = True
    misfit: Literal["refuse", "channel"] = "refuse"
    num_sequences: int = 16
    targets: Targets = field(default_factory=Targets)

    def __post_init__(self) -> None:
        check_number("bits_per_weight", self.bits_per_weight, 2.0, 9.0)
        check_choice("method", self.method, ("gptq", "rtn"))
        check_integer("num_sequences", self.num_sequences, low=1)
        if len(set(self.choices)) < 2:
            raise OptionError(
                f"choices={list(self.choices)} leaves nothing to choose",
                hint=f"name two or more of {', '.join(map(str, BITS))}",
                option="choices",
            )
        self.grids()

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration"})

    def grids(self) -> dict[int, Grid]:
        """By bits, the fewest first.

        Raises:
            OptionError: an option is none of a grid.
        """
        return {
            bits: Grid(
                bits=bits,
                group_size=self.group_size,
                symmetric=self.symmetric,
                scale_format=self.scale_format,
                scale_search=self.scale_search,
                misfit=self.misfit,
            )
            for bits in sorted(set(self.choices))
        }

    def check(self, model: WorkingModel, context: Context) -> None:
        """Raises as `Step.check`."""
        for grid in self.grids().values():
            find_quantizable(grid, model, self.targets, context)

    def run(self, model: WorkingModel, context: Context) -> WorkingModel:
        """Raises as `Step.run`; OptionError where not even the fewest bits are few enough."""
        if not context.calibration:
            raise DataError("there is no calibration text", hint="name a file of text with --calibration")
        grids = self.grids()
        for grid in grids.values():
            names = find_quantizable(grid, model, self.targets, context)
        units = stacked_units(model, names)
        with torch_threads(context.threads):
            options = self._measure(model, units, grids, context)
        chosen = choose_bits(options, self.bits_per_weight * sum(_num_weights(model, name) for name in names))
        by_name = {name: grids[bits] for unit, bits in zip(units, chosen, strict=True) for name in unit}
        self._note(model, by_name, context)
        ordered = {name: by_name[name] for name in names}
        if self.method == "rtn":
            return round_matrices(model, ordered, context, step="mixed")
        return solve_matrices(model, ordered, Solver(), context)

    def _measure(
        self, model: WorkingModel, units: Seq[Seq[str]], grids: Mapping[int, Grid], context: Context
    ) -> list[dict[int, Option]]:
        """What each unit costs at each number of bits."""
        rounded = {
            name: {bits: quantize(name, read_matrix(model, name), grid) for bits, grid in grids.items()}
            for unit in units
            for name in unit
        }
        sequences = context.calibration[: self.num_sequences]
        costs = measure_sensitivity(
            model,
            rounded,
            sequences,
            seed=context.seed,
            progress=lambda done: context.progress("sensitivity", done, len(sequences)),
        )
        return [
            {
                bits: Option(
                    num_bits=sum(stored_bits(rounded[name][bits]) for name in unit),
                    loss=sum(costs[name][bits] for name in unit),
                )
                for bits in grids
            }
            for unit in units
        ]

    def _note(self, model: WorkingModel, grids: Mapping[str, Grid], context: Context) -> None:
        weights: Counter[int] = Counter()
        for name, grid in grids.items():
            weights[grid.bits] += _num_weights(model, name)
        total = weights.total()
        shares = ", ".join(f"{bits} bits {weights[bits] / total:.0%}" for bits in sorted(weights))
        context.notes.append(f"mixed: of the weights have {shares}")


@dataclass(frozen=True, slots=True)
class Option:
    """What a unit takes and loses at some number of bits."""

    num_bits: int
    loss: float


def choose_bits(options: Seq[Mapping[int, Option]], most_bits: float) -> list[int]:
    """For each unit one of its options, so that the losses' sum is small and that of sizes at most
    `most_bits`: from the smallest on, the step that gains most for its size is taken next, while one fits.

    Steps are between options that no mix of two others beats (the lower convex hull), so that as long as none
    is left out for its size, no other choice of this size loses less (Lagrange relaxation of the knapsack).

    >>> options = [{2: Option(2, 9.0), 4: Option(4, 1.0)}, {2: Option(2, 2.0), 4: Option(4, 1.0)}]
    >>> choose_bits(options, 6)
    [4, 2]

    Raises:
        OptionError: the smallest options take more.
    """
    hulls = [_hull(option) for option in options]
    chosen = [0] * len(options)
    left = most_bits - sum(hull[0][1].num_bits for hull in hulls)
    if left < 0:
        times = (most_bits - left) / most_bits
        raise OptionError(
            f"bits_per_weight is too small: the fewest bits that there are take {times:.3f} times that",
            hint="raise bits_per_weight, or offer fewer bits among choices",
            option="bits_per_weight",
        )
    open_units = set(range(len(options)))
    while open_units:
        gains = {unit: _gain(hulls[unit], chosen[unit]) for unit in open_units}
        unit = max(gains, key=lambda u: (gains[u], -u))
        hull, index = hulls[unit], chosen[unit]
        if gains[unit] > 0 and hull[index + 1][1].num_bits - hull[index][1].num_bits <= left:
            left -= hull[index + 1][1].num_bits - hull[index][1].num_bits
            chosen[unit] += 1
        else:
            open_units.remove(unit)
    return [hull[index][0] for hull, index in zip(hulls, chosen, strict=True)]


def stacked_units(model: WorkingModel, names: Seq[str]) -> list[tuple[str, ...]]:
    """The matrices that must have the same bits: those of a station; each of the others is alone."""
    stations = [station.names for station in find_stations(graph_of(model), names)]
    stationed = {name for station in stations for name in station}
    return [*stations, *((name,) for name in names if name not in stationed)]


def stored_bits(tensor: GroupedTensor) -> int:
    """Of codes, and of scales and zero points."""
    groups = tensor.groups(0, 1)
    num_groups = groups.scales.shape[1]
    of_zeros = 0 if groups.zeros is None else tensor.bits
    return int(tensor.shape[0] * (tensor.shape[1] * tensor.bits + num_groups * (16 + of_zeros)))


def _hull(options: Mapping[int, Option]) -> list[tuple[int, Option]]:
    """The options, by rising size, that no mix of two others is as good as."""
    hull: list[tuple[int, Option]] = []
    for bits, option in sorted(options.items(), key=lambda item: item[1].num_bits):
        if hull and option.loss >= hull[-1][1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2][1], hull[-1][1]) <= _slope(hull[-1][1], option):
            hull.pop()
        hull.append((bits, option))
    return hull


def _slope(one: Option, other: Option) -> float:
    """What is lost less for each bit more."""
    return (one.loss - other.loss) / (other.num_bits - one.num_bits)


def _gain(hull: Seq[tuple[int, Option]], index: int) -> float:
    return _slope(hull[index][1], hull[index + 1][1]) if index + 1 < len(hull) else 0.0


def _num_weights(model: WorkingModel, name: str) -> int:
    return math.prod(model.tensors[name].shape)
