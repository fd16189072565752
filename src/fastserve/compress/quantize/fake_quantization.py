"""Fake quantization: a model that learns computes with the numbers of a grid nearest to its weights. Their
gradients go to the weights as if nothing had been rounded (the straight-through estimator, Bengio et al.,
arXiv 1308.3432), and to the scales where these are learned (LSQ, Esser et al., arXiv 1902.08153).
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.checkpoint.tensor import StoredTensor
from fastserve.compress.quantize.grid import Grid, Scales, find_scales
from fastserve.errors import UnsupportedError
from fastserve.evaluate.embedding_model import EmbeddingModel
from fastserve.types import JsonObject

ScaleRule = Literal["learned", "rtn"]
Activations = Literal["float", "int8"]

_KEY = "fake_quantization"  # of the quantizers among a model's modules
_SMALLEST = 1e-30  # largest magnitude of activations that are rounded to 0, as in csrc/kernels/rowwise.h
_ACTIVATION_COLUMNS = 64  # that share a scale at most, as in backends/native/weight_scheme.py


@dataclass(frozen=True, kw_only=True)
class FakeQuantization:
    """The change of weights of a tuning run that has matrices computed with on a grid.

    Attributes:
        names: of the matrices, in the checkpoint that the run starts from.
        scales: `learned` by gradients, from those that `rtn` finds for the source's weights on; or those that
            `rtn` finds for the weights of each step.
        activations: `int8` rounds what matrices multiply with as the native runtime does: of each token, 64
            columns share a scale, or the columns of a group if these are fewer.
    """

    names: tuple[str, ...]
    grid: Grid
    scales: ScaleRule = "learned"
    activations: Activations = "float"

    def to_json(self) -> JsonObject:
        return {"kind": "fake quantization", **asdict(self), "names": list(self.names)}

    def apply(self, model: Any) -> None:
        """As `WeightChange.apply`; a quantizer of each matrix becomes a module of the model.

        Raises:
            OptionError: the grid does not fit a matrix.
        """
        whole = model.encoder if isinstance(model, EmbeddingModel) else model
        parameters = dict(whole.named_parameters())
        owners: dict[Tensor, list[nn.Module]] = {}
        for module in whole.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                owners.setdefault(module.weight, []).append(module)
        quantizers = nn.ModuleList()
        for name in self.names:
            weight = parameters[matching_name(name, parameters)]
            if weight not in owners:
                raise UnsupportedError(
                    f"{name} is neither a linear layer's nor a table's in {type(whole).__name__}",
                    hint="leave it out: exclude, among the targets",
                )
            columns = self.grid.columns_of(name, tuple(weight.shape))
            quantizer = Quantizer(weight, self.grid, columns, learns_scales=self.scales == "learned")
            quantizers.append(quantizer)
            for module in owners[weight]:
                _compute_with(module, quantizer)
                if self.activations == "int8" and isinstance(module, nn.Linear):
                    width = min(columns, _ACTIVATION_COLUMNS)
                    module.register_forward_pre_hook(partial(_round_inputs, width))
        setattr(whole, _KEY, quantizers)

    def read(self, tensors: Mapping[str, StoredTensor]) -> dict[str, Scales]:
        """Of each matrix, by its name in the checkpoint that a run has written, the scales that it was last
        computed with."""
        found = {}
        for index, name in enumerate(self.names):
            scales, zeros = (tensors.get(f"{_KEY}.{index}.{what}") for what in ("scales", "zeros"))
            assert scales is not None
            tuned = matching_name(name, tensors)
            found[tuned] = Scales(
                self.grid,
                self.grid.columns_of(tuned, tensors[tuned].shape),
                torch.from_numpy(to_f32(scales)),
                None if zeros is None else torch.from_numpy(to_f32(zeros)),
            )
        return found


def without_quantizers(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of a run's checkpoint that are the model's."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{_KEY}.")}


def quantize_as_learned(name: str, values: Tensor, scales: Scales) -> GroupedTensor:
    """A matrix by the codes that it was computed with; of fewer rows and columns than were learned, it has
    the first ones'."""
    rows, depth = values.shape
    columns = min(scales.columns, depth)
    groups = -(-depth // columns)
    zeros = None if scales.zeros is None else scales.zeros[:rows, :groups].contiguous()
    kept = Scales(scales.grid, columns, scales.scales[:rows, :groups].contiguous(), zeros)
    return kept.quantize(name, values)


def matching_name(name: str, names: Mapping[str, Any] | Seq[str]) -> str:
    """The one among names that is this one, with another beginning, such as that of a model's body.

    >>> matching_name("layer.0.weight", ["layer.0.bias", "bert.layer.0.weight"])
    'bert.layer.0.weight'

    Raises:
        UnsupportedError: there is none, or several.
    """
    if name in names:
        return name
    found = [each for each in names if each.endswith(f".{name}") or name.endswith(f".{each}")]
    if len(found) != 1:
        raise UnsupportedError(
            f"{name} is not found in the model that is tuned: {', '.join(found) or 'nothing'} is like it",
            hint="leave it out: exclude, among the targets",
        )
    return found[0]


class Quantizer(nn.Module):
    """The numbers on a grid nearest to a matrix [rows, depth] that learns; a call gives them.

    A scale that is learned is `start` times exp(`change` / the root mean square of the matrix's first
    weights): a step of the optimizer changes it by about the share that it changes weights by, which is the
    aim of the paper's section 2.2, and it stays positive. Scales are rounded to the format they are stored in
    before anything is computed with them.

    Args:
        weight: as it is at first.
        columns: that share a scale.
    """

    scales: Tensor  # [rows, groups] that codes are of; in a state_dict those of the present weight
    zeros: Tensor | None  # [rows, groups], whole numbers as floats; those of learned scales stay
    start: Tensor  # [rows, groups], or [1, 1]

    def __init__(self, weight: nn.Parameter, grid: Grid, columns: int, *, learns_scales: bool) -> None:
        super().__init__()
        self._grid, self._columns = grid, columns
        self._weight = (weight,)  # the model has the parameter, this must not have it too
        self._seen: Tensor | None = None  # the weight that `scales` were found for
        with torch.no_grad():
            found = find_scales(weight, grid, columns)
        self.register_buffer("scales", found.scales)
        self.register_buffer("zeros", found.zeros)
        self.change: nn.Parameter | None = None
        if learns_scales:
            shape = (1, 1) if grid.granularity == "tensor" else found.scales.shape
            self.change = nn.Parameter(torch.zeros(shape), requires_grad=weight.requires_grad)
            self.register_buffer("start", found.scales[: shape[0], : shape[1]].clone(), persistent=False)
            self._unit = float(weight.detach().square().mean().sqrt()) or 1.0
        self.register_state_dict_pre_hook(_refresh)  # type: ignore[no-untyped-call]

    def forward(self) -> Tensor:
        (weight,) = self._weight
        return fake_quantize(weight, self._scales(), self.zeros, self._grid, self._columns)

    def _scales(self) -> Tensor:
        """Of the present weight; rounded, but for those that are learned."""
        (weight,) = self._weight
        if self.change is not None:
            scales = self.start * (self.change / self._unit).exp()
            return scales.expand(len(weight), -1)
        # A copy tells, as fused optimizers change a weight and not its version.
        if self._seen is None or self._seen.device != weight.device or not torch.equal(self._seen, weight):
            # By normal tensors: training goes on with what was found in an evaluation.
            with torch.inference_mode(False), torch.no_grad():
                found = find_scales(weight, self._grid, self._columns)
            self.scales, self.zeros, self._seen = found.scales, found.zeros, weight.clone()
        return self.scales

    def refresh(self) -> None:
        """Have `scales` be those of the present weight."""
        with torch.no_grad():
            self.scales = self._grid.round_scales(self._scales()).contiguous()


def _refresh(quantizer: nn.Module, prefix: str, keep_vars: bool) -> None:
    assert isinstance(quantizer, Quantizer)
    quantizer.refresh()


class FakeQuantize(Function):
    """(weight [rows, depth], scales, zeros [rows, groups], grid, columns) to numbers of the grid.

    Gradients with respect to weights are those of the result where a weight lies on the grid's range, and 0
    beyond it; those with respect to scales are of equation 3 of the paper, times the factor of its section
    2.2, 1 / sqrt(weights of a scale x largest code).
    """

    @staticmethod
    def forward(
        context: Any, weight: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid, columns: int
    ) -> Tensor:
        rounded = Scales(grid, columns, grid.round_scales(scales), zeros)
        split = weight.reshape(len(weight), -1, columns)
        codes = rounded.codes(split)
        values = rounded.values(codes).reshape(weight.shape)
        inverse = torch.where(rounded.scales > 0, 1 / rounded.scales, 0)
        at = split * inverse[:, :, None]  # codes and fractions of codes, from the zero point on
        least, most = grid.limits
        low, high = (least, most) if zeros is None else (least - zeros[..., None], most - zeros[..., None])
        is_inside = (at > low) & (at < high)
        slope = None
        if context.needs_input_grad[1]:
            less = codes if zeros is None else codes - zeros[..., None]
            slope = torch.where(is_inside, less - at, less)
        context.save_for_backward(is_inside, slope)
        context.factor = (columns * most) ** -0.5
        return values

    @staticmethod
    def backward(context: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        is_inside, slope = context.saved_tensors
        split = gradient.reshape(is_inside.shape)
        of_scales = None if slope is None else (split * slope).sum(2) * context.factor
        return (split * is_inside).reshape(gradient.shape), of_scales, None, None, None


def fake_quantize(weight: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid, columns: int) -> Tensor:
    """As `FakeQuantize`.

    >>> weight = torch.tensor([[0.4, -2.6]])
    >>> fake_quantize(weight, torch.ones(1, 1), None, Grid(bits=2), 2).tolist()
    [[0.0, -2.0]]
    """
    rounded: Tensor = FakeQuantize.apply(weight, scales, zeros, grid, columns)  # type: ignore[no-untyped-call]
    return rounded


def _compute_with(module: nn.Module, quantizer: Quantizer) -> None:
    """Have a module's `weight` be what a quantizer gives; its parameter of this name stays what is learned,
    saved and loaded."""
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"weight": property(lambda _: quantizer())})


def _round_inputs(columns: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *others = inputs
    return x + (round_activations(x.detach(), columns) - x.detach()), *others


def round_activations(x: Tensor, columns: int) -> Tensor:
    """Activations [..., width] as the native runtime multiplies with them: int8, with a scale for each token
    and `columns` neighbouring columns, the last of which may be fewer (csrc/kernels/rowwise.h:
    quantize_row)."""
    width = x.shape[-1]
    padded = functional.pad(x, (0, -width % columns))
    padded = padded.reshape(*x.shape[:-1], -1, columns)
    largest = padded.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > _SMALLEST, 127 / largest, 0)
    rounded: Tensor = ((padded * inverse).round() * (largest / 127)).flatten(-2)[..., :width]
    return rounded
