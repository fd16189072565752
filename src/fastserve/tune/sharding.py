"""Training of a model that lies in parts on a mesh of processes, [data, tensor]: those of a row compute
matrices together (`tensor_parallel`); those of a column share each batch and, sharded (FSDP2,
`torch.distributed.fsdp.fully_shard`), the weights, of which each has a layer whole only while it computes it.

`transformers.Trainer` leaves a model that is cut before it comes to it as it is, but cannot resume one;
accelerate shards none on CPUs, and refuses to compute tensors in parallel there, hence is told nothing of it.
Checkpoints are a file a process, exact, for as many processes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce, barrier, get_rank, get_world_size
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from fastserve.evaluate.embedding_model import EmbeddingModel
from fastserve.evaluate.task.task import Scores
from fastserve.tune.tensor_parallel import cut_tensors
from fastserve.tune.trainer import TaskTrainer

# Layers of a stack, not what is in them (T5's blocks have parts that are called layers).
_LAYER = re.compile(r"(?:(?!\.\d+\.).)*\.(?:block|layer|layers|h|blocks)\.\d+")


@dataclass(frozen=True, slots=True)
class Cut:
    """How a model lies on processes.

    Attributes:
        data: those that have the same part of matrices, and other rows.
        tensor: those that have the same rows.
        is_sharded: whether the first share weights too, and so add up gradients as they go.
        summed: modules that are whole, and of whose gradients each of `tensor` has a summand.
    """

    data: DeviceMesh
    tensor: DeviceMesh
    is_sharded: bool
    summed: Seq[nn.Module]


def cut_model(model: nn.Module, device: torch.device, *, tensor_parallel: int, shard: bool) -> Cut:
    """Cut a model's parameters, for the processes of the group, which has begun: neighbours, so many as
    `tensor_parallel`, have parts of matrices; with `shard`, all others along their first dimension.

    Raises:
        UnsupportedError, OptionError: as `fastserve.tune.tensor_parallel.tensor_plan`.
    """
    shape = (get_world_size() // tensor_parallel, tensor_parallel)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "tensor"))
    model.to(device)
    summed: Seq[nn.Module] = ()
    if tensor_parallel > 1:
        body = model.encoder if isinstance(model, EmbeddingModel) else model
        summed = cut_tensors(body, mesh["tensor"])
    if shard:
        _shard(model, mesh["data"])
    return Cut(mesh["data"], mesh["tensor"], shard, summed)


def _shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """The layers of a model's stacks are gathered and let go one by one, the rest together."""
    for name, module in model.named_modules():
        if _LAYER.fullmatch(f".{name}"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


class ShardedTrainer(TaskTrainer):
    """A trainer of a model that `cut_model` has cut. Its checkpoints have a file a process."""

    def __init__(self, *, cut: Cut, **arguments: Any) -> None:
        self._cut = cut
        super().__init__(**arguments, share=(cut.data.get_local_rank(), cut.data.size()))
        # As if from_pretrained had sharded it: nobody wraps it, moves it, or reduces its gradients again.
        self.is_distributed_loading_by_transformers = True
        self.place_model_on_device = False

    def get_tp_size(self) -> int:
        """By which `transformers` counts rows once that several processes have."""
        return int(self._cut.tensor.size())

    def training_step(self, *arguments: Any, **more: Any) -> Tensor:
        loss: Tensor = super().training_step(*arguments, **more)
        if self.accelerator.sync_gradients:  # the last part of a batch
            self._add_up_gradients()
        return loss

    def _add_up_gradients(self) -> None:
        """What neither the model nor FSDP adds up on its way."""
        cut = self._cut
        for module in cut.summed:
            for gradient in _gradients(module.parameters()):
                all_reduce(gradient, group=cut.tensor.get_group())
        if cut.data.size() > 1 and not cut.is_sharded:
            for gradient in _gradients(self.model.parameters()):
                all_reduce(gradient, ReduceOp.AVG, group=cut.data.get_group())

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """They begin alike, and `_add_up_gradients` keeps them so; a mean over all would be no sum."""

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


def _gradients(parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:
    """The parts of this process; share memory."""
    return (_local(parameter.grad) for parameter in parameters if parameter.grad is not None)


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
