"""From a path to a model that runs: checkpoint, graph, passes, capacities, memory check, backend."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from fastserve.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.config import DEFAULT_CONTEXT_LENGTH, EngineOptions, WeightFormat
from fastserve.engine.available_memory import available_memory_bytes
from fastserve.engine.footprint import BLOCK_SIZE, Footprint, activation_bytes, block_bytes, weights_bytes
from fastserve.errors import ContextLengthError, MemoryLimitError, UnsupportedError
from fastserve.graph.node import Attention, Graph
from fastserve.graph.passes import optimize
from fastserve.models.config import DecoderConfig
from fastserve.models.family import ModelConfig, build_graph, read_config
from fastserve.models.parameters import check_parameters
from fastserve.models.pooling import Pooling
from fastserve.types import Executable, Limits

MAX_DERIVED_KV_BYTES = (
    2**30
)  # enough for several long sequences of a small model; more is asked for explicitly

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


def load_model(path: Path, options: EngineOptions) -> LoadedModel:
    """Load the model in a folder or .gguf file.

    Raises:
        CheckpointError, UnsupportedError: it cannot be read, or has something that we do not compute.
        ContextLengthError: `context_length` is beyond the model's own.
        MemoryLimitError: it needs more memory than there is; said before weights are read.
    """
    checkpoint = open_checkpoint(path)
    config = read_config(checkpoint.config)
    graph = build_graph(config, checkpoint.tensors.keys(), pooling=_read_pooling(checkpoint))
    for name in check_parameters(graph, checkpoint.tensors):
        logger.info("%s: tensor %s is not used", path, name)
    graph = optimize(graph)
    is_decoder = isinstance(config, DecoderConfig)
    weights = choose_weights(options, is_decoder=is_decoder)
    context_length = choose_context_length(options, _model_context(checkpoint, config))
    available_bytes = available_memory_bytes()
    limits, footprint = plan_capacity(
        graph, options, weights=weights, context_length=context_length, available_bytes=available_bytes
    )
    if available_bytes is not None:
        footprint.check(available_bytes)
    executable = _compile(graph, checkpoint, options, weights=weights, limits=limits)
    assert executable.block_size == BLOCK_SIZE
    return LoadedModel(
        checkpoint=checkpoint,
        config=config,
        tokenizer=Tokenizer.from_checkpoint(checkpoint),
        executable=executable,
        weights=weights,
        context_length=context_length,
        footprint=footprint,
    )


def choose_weights(options: EngineOptions, *, is_decoder: bool) -> WeightFormat:
    """What `auto` comes to: see EngineOptions."""
    if options.weights != "auto":
        return options.weights
    return "int8" if is_decoder and options.backend == "native" else "f32"


def choose_context_length(options: EngineOptions, model_context: int) -> int:
    """
    Raises:
        ContextLengthError: more is asked for than the model was made for.
    """
    if options.context_length is None:
        return min(model_context, DEFAULT_CONTEXT_LENGTH)
    if options.context_length > model_context:
        raise ContextLengthError(
            f"context_length is {options.context_length}; the model was made for {model_context} tokens",
            hint=f"choose a context_length of at most {model_context}",
        )
    return options.context_length


def plan_capacity(
    graph: Graph,
    options: EngineOptions,
    *,
    weights: WeightFormat,
    context_length: int,
    available_bytes: int | None,
) -> tuple[Limits, Footprint]:
    """The capacities to compile for, and the memory that they take.

    The KV pool holds `kv_memory`. Without it, it holds what `max_sequences` could fill, within half of the
    memory that the rest leaves and MAX_DERIVED_KV_BYTES, but at least one whole context.

    Raises:
        MemoryLimitError: `kv_memory` does not hold one context.
    """
    is_causal = all(node.causal for node in graph.nodes if isinstance(node, Attention))
    limits = Limits(
        max_tokens=options.max_batch_tokens if is_causal else max(options.max_batch_tokens, context_length),
        max_outputs=options.max_sequences,
        max_sequences=options.max_sequences,
        num_blocks=-(-context_length // BLOCK_SIZE),  # at least
        max_context=context_length,
    )
    # A causal sequence keeps its keys and values from step to step; an encoder's live for one step.
    most_tokens = context_length * limits.max_sequences if is_causal else limits.max_tokens
    most_blocks = most_tokens // BLOCK_SIZE + limits.max_sequences
    footprint = Footprint(
        weights_bytes=weights_bytes(graph, weights),
        activation_bytes=activation_bytes(graph, limits),
        kv_bytes=0,
    )
    per_block = block_bytes(graph, options.kv_dtype)
    if options.kv_memory_bytes is not None:
        num_blocks = options.kv_memory_bytes // per_block
        _check_kv_memory(num_blocks, limits, per_block)
    else:
        spare_bytes = MAX_DERIVED_KV_BYTES
        if available_bytes is not None:
            spare_bytes = min(spare_bytes, (available_bytes - footprint.total_bytes) // 2)
        num_blocks = max(limits.num_blocks, min(most_blocks, spare_bytes // per_block))
    return replace(limits, num_blocks=num_blocks), replace(footprint, kv_bytes=num_blocks * per_block)


def _check_kv_memory(num_blocks: int, limits: Limits, per_block: int) -> None:
    if num_blocks < limits.num_blocks:
        raise MemoryLimitError(
            f"kv_memory holds {num_blocks * BLOCK_SIZE} tokens; the context is {limits.max_context} tokens",
            hint=f"choose kv_memory={limits.num_blocks * per_block} or more, or a smaller context_length",
        )


def _model_context(checkpoint: Checkpoint, config: ModelConfig) -> int:
    """Encoders may be made for shorter texts than their position table holds."""
    made_for = checkpoint.sentence.max_tokens if checkpoint.sentence else None
    return min(config.max_context, made_for or config.max_context)


def _read_pooling(checkpoint: Checkpoint) -> Pooling | None:
    sentence = checkpoint.sentence
    return Pooling.from_sentence_transformers(sentence.modules, sentence.pooling) if sentence else None


def _compile(
    graph: Graph, checkpoint: Checkpoint, options: EngineOptions, *, weights: WeightFormat, limits: Limits
) -> Executable:
    if options.backend == "torch":
        return _compile_torch(graph, checkpoint, options, limits)
    from fastserve.backends.native.executable import compile_native

    return compile_native(
        graph,
        checkpoint.tensors,
        weights=weights,
        limits=limits,
        kv_dtype=options.kv_dtype,
        threads=options.threads,
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
    )
