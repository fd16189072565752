"""Weights of which a process may have a part alone: put together, and taken apart."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_part(tensor: Tensor) -> bool:
    """Whether other processes have the rest of it."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts. All processes must ask for it."""
    found: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach()


def gather_weights(model: nn.Module, *, keeps: bool) -> dict[str, Tensor]:
    """All weights and buffers by name, whole, on the CPU. All processes must ask for them; those that do not
    `keep` any get nothing."""
    found = {}
    for name, tensor in model.state_dict().items():
        gathered = whole(tensor)
        if keeps:
            found[name] = gathered.cpu()
    return found


def set_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put whole weights into parameters, sharded or not, by name."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in weights.items():
            parameter = parameters[name]
            if isinstance(parameter, DTensor):
                values = distribute_tensor(
                    values.to(parameter.device), parameter.device_mesh, parameter.placements
                )
            parameter.copy_(values)
