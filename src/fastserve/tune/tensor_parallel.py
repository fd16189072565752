"""Tensor parallelism: each process of a group has a part of a layer's matrices, and they compute it together
(Shoeybi et al. 2019, arXiv 1909.08053, section 3).

Which matrices are cut, and how, is a plan: that of `transformers`, where a family has one, else ours.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from fastserve.errors import OptionError, UnsupportedError

Plan = Mapping[str, str]
"""Styles by the names of modules."""

_SUMMED = "replicated_with_grad_allreduce"
"""Of what is whole in each process, and sees the heads of that process alone: its gradient is a summand."""

# In the words of `transformers`; `colwise` cuts a linear layer's outputs, `rowwise` its inputs.
_QUERIES = ("q_proj", "query", "q_lin", "query_key_value")  # an attention is what one of them is of
_DROPOUT_OF_HEADS = ("attention_dropout", "attention_probs_dropout_prob")  # keys of a config
_COLWISE = ("colwise", "colwise_gather_output")
_ROWWISE = ("rowwise", "rowwise_split_input")


def _bert_plan(layer: str) -> Plan:
    return {
        f"{layer}.attention.self.query": "colwise",
        f"{layer}.attention.self.key": "colwise",
        f"{layer}.attention.self.value": "colwise",
        f"{layer}.attention.output.dense": "rowwise",
        f"{layer}.intermediate.dense": "colwise",
        f"{layer}.output.dense": "rowwise",
    }


# Of families for which `transformers` has none; "*" is a layer's number.
_PLANS: Mapping[str, Plan] = {
    "bert": _bert_plan("encoder.layer.*"),
    "roberta": _bert_plan("encoder.layer.*"),
    "xlm-roberta": _bert_plan("encoder.layer.*"),
    "distilbert": {
        "transformer.layer.*.attention.q_lin": "colwise",
        "transformer.layer.*.attention.k_lin": "colwise",
        "transformer.layer.*.attention.v_lin": "colwise",
        "transformer.layer.*.attention.out_lin": "rowwise",
        "transformer.layer.*.ffn.lin1": "colwise",
        "transformer.layer.*.ffn.lin2": "rowwise",
    },
}


def tensor_plan(model: Any, size: int) -> Plan:
    """The plan of a model of `transformers`, by its modules' full names, checked for groups of `size`
    processes. The head of a language model is cut where it is a matrix of its own and can be.

    Raises:
        UnsupportedError: its family has no plan, or one of other styles (mixtures of experts).
        OptionError: its heads, or the width of a matrix, cannot be shared evenly.
    """
    config = model.config
    body = config.base_model_tp_plan or _PLANS.get(config.model_type)
    if not body:
        raise UnsupportedError(
            f"tensor_parallel={size}: architecture {config.model_type!r} has no plan of what to cut",
            hint="share batches (processes), or weights too (shard)",
        )
    styles = (*_COLWISE, *_ROWWISE, _SUMMED)
    if strange := sorted({style for style in body.values() if style not in styles}):
        raise UnsupportedError(
            f"tensor_parallel={size}: the plan of architecture {config.model_type!r} has layers of style"
            f" {strange[0]!r}",
            hint="share batches (processes), or weights too (shard)",
        )
    prefix = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    rules = {prefix + name: style for name, style in body.items()}
    plan = {
        name: rules[pattern]
        for name, _ in model.named_modules()
        if (pattern := re.sub(r"\.\d+(?=\.)", ".*", name)) in rules
    }
    assert plan, f"{type(model).__name__} has no module of its plan"
    _check_heads(config, plan, size)
    for name, style in plan.items():
        _check_width(name, model.get_submodule(name), style, size)
    head = model.get_output_embeddings()
    if head is not None and _has_own_weight(model, head) and head.out_features % size == 0:
        name = next(name for name, module in model.named_modules() if module is head)
        plan[name] = "colwise_gather_output"
    return plan


def cut_tensors(model: Any, mesh: DeviceMesh) -> list[nn.Module]:
    """Cut a model's matrices by its plan among the processes of a mesh of one dimension. All must have drawn
    the same random numbers up to now, and do so from now on.

    Returns the modules of whose gradients each process has a summand.
    """
    plan = tensor_plan(model, mesh.size())
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    styles = {name: _STYLES[style]() for name, style in plan.items() if style != _SUMMED}
    parallelize_module(model, mesh, styles)
    for name in frozen:
        model.get_parameter(name).requires_grad = False
    if any(getattr(model.config, name, 0.0) for name in _DROPOUT_OF_HEADS):
        for name, style in plan.items():
            parent, _, leaf = name.rpartition(".")
            if leaf in _QUERIES and style == "colwise":
                _draw_for_own_heads(model.get_submodule(parent), mesh.get_local_rank())
    return [model.get_submodule(name) for name, style in plan.items() if style == _SUMMED]


def _draw_for_own_heads(attention: nn.Module, rank: int) -> None:
    """What an attention drops is drawn for the heads of this process alone, which else would be what is
    dropped of the others'; all processes go on with the same random numbers afterwards."""
    forward = attention.forward

    @functools.wraps(forward)
    def draw_and_run(*arguments: Any, **more: Any) -> Any:
        if not attention.training:
            return forward(*arguments, **more)
        seed = int(torch.randint(2**62, ()))
        device = next(attention.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed + rank)
            return forward(*arguments, **more)

    attention.forward = draw_and_run


def _rowwise_split_input() -> ParallelStyle:
    return RowwiseParallel(input_layouts=Replicate())


def _colwise_gather_output() -> ParallelStyle:
    return ColwiseParallel(output_layouts=Replicate())


_STYLES = {
    "colwise": ColwiseParallel,
    "colwise_gather_output": _colwise_gather_output,
    "rowwise": RowwiseParallel,
    "rowwise_split_input": _rowwise_split_input,
}


def _check_heads(config: Any, plan: Plan, size: int) -> None:
    if "colwise" not in plan.values():
        return  # each process has all heads
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if heads and heads % size:
            raise OptionError(
                f"tensor_parallel={size}: the model's {name}={heads} cannot be shared evenly",
                hint=f"choose a divisor of {heads}, or share weights (shard)",
                option="tensor_parallel",
            )


def _check_width(name: str, module: nn.Module, style: str, size: int) -> None:
    if style == _SUMMED:
        return
    assert isinstance(module, nn.Linear), f"{name} is {type(module).__name__}"
    width = module.out_features if style in _COLWISE else module.in_features
    if width % size:
        raise OptionError(
            f"tensor_parallel={size}: the {width} {'rows' if style in _COLWISE else 'columns'} of {name}"
            " cannot be shared evenly",
            hint=f"choose a divisor of {width}, or share weights (shard)",
            option="tensor_parallel",
        )


def _has_own_weight(model: Any, head: nn.Module) -> bool:
    embeddings = model.get_input_embeddings()
    return isinstance(head, nn.Linear) and head.weight is not embeddings.weight
