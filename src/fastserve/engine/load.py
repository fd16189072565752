"""From a path to a model that runs: checkpoint, graph, passes, capacities, memory check, backend."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastserve.backends.native.weight_scheme import choose_schemes
from fastserve.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.config import EngineOptions, WeightFormat
from fastserve.engine.available_memory import available_memory_bytes
from fastserve.engine.capacity import Capacity, choose_context_length, plan_capacity
from fastserve.engine.footprint import BLOCK_SIZE, Footprint
from fastserve.engine.processor import processor_name
from fastserve.errors import UnsupportedError
from fastserve.graph.node import Graph
from fastserve.graph.passes import optimize
from fastserve.models.config import DecoderConfig
from fastserve.models.family import ModelConfig, build_graph, read_config
from fastserve.models.parameters import check_parameters
from fastserve.models.pooling import Pooling
from fastserve.types import Executable, Limits

Task = Literal["generate", "embed"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to run. `weights` and `context_length` are what the options came to."""

    checkpoint: Checkpoint
    config: ModelConfig
    tokenizer: Tokenizer
    executable: Executable
    weights: WeightFormat
    context_length: int
    footprint: Footprint

    @property
    def is_decoder(self) -> bool:
        return isinstance(self.config, DecoderConfig)


def load_model(
    path: Path, options: EngineOptions, *, name: str | None = None, task: Task | None = None
) -> LoadedModel:
    """Load the model in a folder or .gguf file. Messages call it `name`, by default its path.

    Raises:
        UnsupportedError: it is not made for `task`; said before weights are read.
        CheckpointError, UnsupportedError: it cannot be read, or has something that we do not compute.
        ContextLengthError: `context_length` is beyond the model's own.
        MemoryLimitError: it needs more memory than there is; said before weights are read.
    """
    checkpoint = open_checkpoint(path)
    config = read_config(checkpoint.config)
    if task is not None:
        check_task(task, config, name or str(path))
    graph = build_graph(config, checkpoint.tensors.keys(), pooling=_read_pooling(checkpoint))
    for name in check_parameters(graph, checkpoint.tensors):
        logger.info("%s: tensor %s is not used", path, name)
    graph = optimize(graph)
    is_decoder = isinstance(config, DecoderConfig)
    weights = choose_weights(options, is_decoder=is_decoder)
    context_length = choose_context_length(options, model_context(checkpoint, config))
    # What another device has is for torch to say, which refuses what does not fit.
    available_bytes = available_memory_bytes() if options.device in (None, "cpu") else None
    capacity = plan_capacity(
        graph,
        options,
        schemes=choose_schemes(graph, weights, checkpoint.tensors),
        context_length=context_length,
        available_bytes=available_bytes,
    )
    if available_bytes is not None:
        capacity.footprint.check(available_bytes)
    try:
        tokenizer = Tokenizer.from_checkpoint(checkpoint)
        executable = _compile(graph, checkpoint, options, capacity)
    except MemoryError as error:  # others took it meanwhile, or the system grants less than it says
        raise capacity.footprint.to_error(available_bytes and available_memory_bytes()) from error
    assert executable.block_size == BLOCK_SIZE
    return LoadedModel(
        checkpoint=checkpoint,
        config=config,
        tokenizer=tokenizer,
        executable=executable,
        weights=weights,
        context_length=context_length,
        footprint=capacity.footprint,
    )


def check_task(task: Task, config: ModelConfig, name: str) -> None:
    """
    Raises:
        UnsupportedError: the model called `name` is not made for the task.
    """
    is_decoder = isinstance(config, DecoderConfig)
    if task == "generate" and not is_decoder:
        raise UnsupportedError(
            f"the model {name!r} is an encoder; it does not generate text",
            hint="use embed, or a language model such as smollm2-135m-instruct",
        )
    if task == "embed" and is_decoder:
        raise UnsupportedError(
            f"the model {name!r} generates text; it has no embeddings",
            hint="use an encoder, such as all-minilm-l6-v2",
        )


def choose_weights(options: EngineOptions, *, is_decoder: bool) -> WeightFormat:
    """What `auto` comes to: see EngineOptions."""
    if options.weights != "auto":
        return options.weights
    return "int8" if is_decoder and options.backend == "native" else "f32"


def model_context(checkpoint: Checkpoint, config: ModelConfig) -> int:
    """Encoders may be made for shorter texts than their position table holds."""
    made_for = checkpoint.sentence.max_tokens if checkpoint.sentence else None
    return min(config.max_context, made_for or config.max_context)


def _read_pooling(checkpoint: Checkpoint) -> Pooling | None:
    sentence = checkpoint.sentence
    return Pooling.from_sentence_transformers(sentence.modules, sentence.pooling) if sentence else None


def _compile(graph: Graph, checkpoint: Checkpoint, options: EngineOptions, capacity: Capacity) -> Executable:
    if capacity.layout is None:
        return _compile_torch(graph, checkpoint, options, capacity.limits)
    from fastserve.backends.native.executable import compile_layout
    from fastserve.backends.native.packed_cache import PackedCache
    from fastserve.backends.native.storage_choice import StorageChoice

    return compile_layout(
        capacity.layout,
        checkpoint.tensors,
        limits=capacity.limits,
        kv_dtype=options.kv_dtype,
        threads=options.threads,
        cache=PackedCache.of(checkpoint.files),
        storage_choice=StorageChoice(processor_name()),
    )


def _compile_torch(
    graph: Graph, checkpoint: Checkpoint, options: EngineOptions, limits: Limits
) -> Executable:
    try:
        from fastserve.backends.torch.executable import compile_torch
    except ImportError as error:
        raise UnsupportedError(
            f"backend='torch' needs PyTorch: {error}", hint="install torch, or use backend='native'"
        ) from error
    names = {name for node in graph.nodes for parameter in node.parameters() for name in parameter.names}
    return compile_torch(
        graph,
        {name: to_f32(checkpoint.tensors[name]) for name in names},
        limits=limits,
        kv_dtype=options.kv_dtype,
        block_size=BLOCK_SIZE,
        device=options.device or "cpu",
    )
