"""Sharded training (FSDP2, `torch.distributed.fsdp.fully_shard`): each process keeps its part of every
weight, of its gradient and of its optimizer's state, and has a layer whole only while it computes it.

`transformers.Trainer` leaves a model that is sharded before it comes to it as it is, but cannot resume one;
accelerate shards none on CPUs. Hence checkpoints here: a file a process, exact, for as many processes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import barrier, get_rank, get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from fastserve.evaluate.task.task import Scores
from fastserve.tune.trainer import TaskTrainer

# Layers of a stack, not what is in them (T5's blocks have parts that are called layers).
_LAYER = re.compile(r"(?:(?!\.\d+\.).)*\.(?:block|layer|layers|h|blocks)\.\d+")


def shard_model(model: nn.Module, device: torch.device) -> None:
    """Cut all parameters of a model along their first dimension, a part for each process of the group, which
    has begun. The layers of its stacks are gathered and let go one by one, the rest together."""
    mesh = init_device_mesh(device.type, (get_world_size(),))
    model.to(device)
    for name, module in model.named_modules():
        if _LAYER.fullmatch(f".{name}"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


class ShardedTrainer(TaskTrainer):
    """A trainer of a model that `shard_model` has cut. Its checkpoints have a file a process."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        # As if from_pretrained had sharded it: nobody wraps it, moves it, or reduces its gradients again.
        self.is_distributed_loading_by_transformers = True
        self.place_model_on_device = False

    def score_dev(self) -> Scores:
        scores = super().score_dev()
        for module in self.model.modules():
            # What no backward pass follows leaves the outermost parameters whole, and those are copies.
            if isinstance(module, FSDPModule):
                module.reshard()
        return scores

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Parts of a batch add up here, before processes add theirs."""
        model: Any = self.model
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The weights are with the optimizer's state in the files of the processes."""
        Path(output_dir or self.args.output_dir).mkdir(parents=True, exist_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        parameters = dict(self.model.named_parameters())
        state = {
            "weights": {name: _local(parameter) for name, parameter in parameters.items()},
            "optimizer": _to_local(self.optimizer.state_dict()),
            "scheduler": self.lr_scheduler.state_dict(),
        }
        torch.save(state, _shard_file(output_dir))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        barrier()  # the file that says that a checkpoint is whole comes after those of all

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        stored = torch.load(_shard_file(resume_from_checkpoint), map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                _local(parameter).copy_(stored["weights"][name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        stored = torch.load(_shard_file(checkpoint), map_location="cpu", weights_only=True)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.optimizer.load_state_dict(_from_local(stored["optimizer"], parameters))
        self.lr_scheduler.load_state_dict(stored["scheduler"])


def _shard_file(folder: str) -> Path:
    return Path(folder) / f"shard_{get_rank()}.pt"


def _local(tensor: Tensor) -> Tensor:
    """The part of this process; shares memory."""
    found: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return found.detach()


def _to_local(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state with the parts of this process alone, and which of them are parts."""
    states = {
        index: {name: _local(value) if isinstance(value, Tensor) else value for name, value in state.items()}
        for index, state in optimizer["state"].items()
    }
    parts = {
        index: [name for name, value in state.items() if isinstance(value, DTensor)]
        for index, state in optimizer["state"].items()
    }
    return {"state": states, "parts": parts, "param_groups": optimizer["param_groups"]}


def _from_local(stored: Mapping[str, Any], parameters: list[Any]) -> dict[str, Any]:
    """What `_to_local` has taken apart; parts lie as those of their parameters do."""
    states = {index: dict(state) for index, state in stored["state"].items()}
    for index, names in stored["parts"].items():
        parameter = parameters[index]
        for name in names:
            states[index][name] = DTensor.from_local(
                states[index][name].to(parameter.device),
                parameter.device_mesh,
                parameter.placements,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
    return {"state": states, "param_groups": stored["param_groups"]}
