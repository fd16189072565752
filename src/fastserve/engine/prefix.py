"""Puts a model's prefix before all of its texts: see `fastserve.backends.prefix`."""

from __future__ import annotations

from fastserve.backends.prefix import PrefixedExecutable, empty_slots, prefix_blocks
from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.config import EngineOptions
from fastserve.engine.footprint import BLOCK_SIZE
from fastserve.errors import UnsupportedError
from fastserve.graph.node import Graph
from fastserve.graph.passes import leave_slots_empty
from fastserve.models.config import DecoderConfig
from fastserve.models.family import ModelConfig
from fastserve.models.prefix import Prefix, build_prefix, read_prefix
from fastserve.types import Executable, Limits, SourceExecutable


def prefix_of(checkpoint: Checkpoint, config: ModelConfig) -> Prefix | None:
    """The prefix of a model, None where it has none.

    Raises:
        UnsupportedError: the model is no decoder.
        CheckpointError: as `read_prefix`.
    """
    prefix = read_prefix(checkpoint.config)
    if prefix is not None and not isinstance(config, DecoderConfig):
        raise UnsupportedError(
            f"{checkpoint.path} has a tuned prefix, and {config.model_type!r} is no decoder",
            hint="tune a decoder with method='prefix', or this model with another method",
        )
    return prefix


def after_prefix(graph: Graph, prefix: Prefix | None) -> Graph:
    """The graph, before any pass, that the prefix's executable takes."""
    if prefix is None:
        return graph
    return leave_slots_empty(graph, empty_slots(prefix.num_tokens, BLOCK_SIZE))


def put_prefix_before(
    executable: Executable,
    prefix: Prefix,
    config: DecoderConfig,
    checkpoint: Checkpoint,
    options: EngineOptions,
) -> PrefixedExecutable:
    """The executable, compiled for `after_prefix`, with the prefix stored in its pool."""
    graph = build_prefix(config, prefix)
    limits = Limits(
        max_tokens=BLOCK_SIZE,
        max_outputs=1,
        max_sequences=1,
        num_blocks=prefix_blocks(prefix.num_tokens, BLOCK_SIZE),
        max_context=BLOCK_SIZE,
    )
    return PrefixedExecutable(
        executable, prefix.num_tokens, _compile_source(graph, checkpoint, limits, options)
    )


def _compile_source(
    graph: Graph, checkpoint: Checkpoint, limits: Limits, options: EngineOptions
) -> SourceExecutable:
    """What stores the prefix, in float32 up to where it is stored. The graph has no steps of its own: that of
    the encoder is the same."""
    names = {name for node in graph.nodes for parameter in node.parameters() for name in parameter.names}
    if options.backend == "torch":
        from fastserve.backends.torch.executable import compile_torch

        return compile_torch(
            graph,
            {name: to_f32(checkpoint.tensors[name]) for name in names},
            limits=limits,
            kv_dtype=options.kv_dtype,
            block_size=BLOCK_SIZE,
            device=options.device or "cpu",
            encoder=graph,
        )
    from fastserve.backends.native.executable import compile_native

    return compile_native(
        graph,
        checkpoint.tensors,
        weights="f32",
        limits=limits,
        kv_dtype=options.kv_dtype,
        threads=1,
        encoder=graph,
    )
