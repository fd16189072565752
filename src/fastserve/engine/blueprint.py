"""One model from its files to an executable: checkpoint, graph, passes, capacities, memory check, backend."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastserve.backends.native.weight_scheme import choose_schemes
from fastserve.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.generation import TargetRules, read_target_rules
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.config import EngineOptions, WeightFormat
from fastserve.engine.available_memory import available_memory_bytes
from fastserve.engine.capacity import Capacity, choose_context_length, plan_capacity
from fastserve.engine.footprint import BLOCK_SIZE
from fastserve.engine.loaded_model import LoadedModel
from fastserve.engine.prefix import after_prefix, prefix_of, put_prefix_before
from fastserve.engine.processor import processor_name
from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.graph.node import Graph
from fastserve.graph.passes import optimize
from fastserve.models.config import DecoderConfig, EncoderConfig, EncoderDecoderConfig
from fastserve.models.family import (
    ModelConfig,
    arrange_tensors,
    build_graph,
    build_source_encoder,
    read_config,
)
from fastserve.models.head import Ending
from fastserve.models.parameters import check_parameters
from fastserve.models.pooling import Pooling
from fastserve.models.prefix import Prefix, build_prefix, read_prefix, without_prefix
from fastserve.models.task import TaskSettings, read_task
from fastserve.types import Executable

logger = logging.getLogger(__name__)

_NEVER = -1e9  # a logit whose probability is 0 in float32


def open_model(path: Path) -> tuple[Checkpoint, ModelConfig]:
    """A model on disk, its tensors as its graph takes them."""
    checkpoint = open_checkpoint(path)
    config = read_config(without_prefix(checkpoint.config))
    prefix_of(checkpoint, config)  # refused here, where it is wrong
    return replace(checkpoint, tensors=arrange_tensors(config, checkpoint.tensors)), config


@dataclass(frozen=True, slots=True)
class Blueprint:
    """Of a model that is to be compiled."""

    graph: Graph
    encoder: Graph | None  # of an encoder-decoder
    weights: WeightFormat
    context_length: int
    capacity: Capacity
    prefix: Prefix | None


def draw(
    checkpoint: Checkpoint, config: ModelConfig, options: EngineOptions, available_bytes: int | None
) -> Blueprint:
    prefix = prefix_of(checkpoint, config)
    num_prefix_tokens = 0 if prefix is None else prefix.num_tokens
    context_length = choose_context_length(
        options,
        model_context(checkpoint, config),
        usual_context=_usual_context(checkpoint, config),
        changes_beyond=isinstance(config, DecoderConfig),
    )
    computed = config
    if isinstance(config, DecoderConfig):
        computed = config.for_context(num_prefix_tokens + context_length)
    graph = _build(checkpoint, computed)
    encoder = build_source_encoder(computed, checkpoint.tensors.keys())
    _check_tensors(checkpoint, config, graph, encoder)
    graph, encoder = optimize(after_prefix(graph, prefix)), optimize(encoder) if encoder else None
    weights = choose_weights(
        options,
        generates=settings_of(checkpoint, config).task == "generate",
        has_integers=any(isinstance(tensor, GroupedTensor) for tensor in checkpoint.tensors.values()),
    )
    capacity = plan_capacity(
        graph,
        options,
        schemes=choose_schemes(graph.beside(encoder) if encoder else graph, weights, checkpoint.tensors),
        context_length=context_length,
        available_bytes=available_bytes,
        encoder=encoder,
        num_prefix_tokens=num_prefix_tokens,
    )
    return Blueprint(graph, encoder, weights, context_length, capacity, prefix)


def _check_tensors(checkpoint: Checkpoint, config: ModelConfig, graph: Graph, encoder: Graph | None) -> None:
    """
    Raises:
        CheckpointError: a tensor of the model, or of its prefix, is missing or has another shape.
    """
    graphs = graph if encoder is None else graph.beside(encoder)
    prefix = prefix_of(checkpoint, config)
    if prefix is not None and isinstance(config, DecoderConfig):
        graphs = graphs.beside(build_prefix(config, prefix))
    for name in check_parameters(graphs, checkpoint.tensors):
        # Else it is one of the layers that are left out.
        if config == read_config(without_prefix(checkpoint.config)):
            logger.info("%s: tensor %s is not used", checkpoint.path, name)


def load_single(
    checkpoint: Checkpoint, config: ModelConfig, options: EngineOptions, *, reserved_bytes: int = 0
) -> LoadedModel:
    """Load one model. `reserved_bytes` of what looks free are somebody else's."""
    # What another device has is for torch to say, which refuses what does not fit.
    available_bytes = available_memory_bytes() if options.device in (None, "cpu") else None
    if available_bytes is not None:
        available_bytes -= reserved_bytes
    blueprint = draw(checkpoint, config, options, available_bytes)
    capacity = blueprint.capacity
    if available_bytes is not None:
        capacity.footprint.check(available_bytes)
    try:
        tokenizer = Tokenizer.from_checkpoint(checkpoint)
        target_rules = target_tokenizer = None
        if isinstance(config, EncoderDecoderConfig):
            folder, vocab_size = checkpoint.path, config.target_vocab_size
            target_rules = read_target_rules(folder, checkpoint.config, vocab_size=vocab_size)
            checkpoint = _renormalized(checkpoint, blueprint.graph, target_rules)
            if config.has_two_vocabularies:
                target_tokenizer = Tokenizer.of_targets(folder, vocab_size)
        executable = _compile(blueprint, checkpoint, options)
        if blueprint.prefix is not None:
            assert isinstance(config, DecoderConfig)
            executable = put_prefix_before(executable, blueprint.prefix, config, checkpoint, options)
    except MemoryError as error:  # others took it meanwhile, or the system grants less than it says
        raise capacity.footprint.to_error(available_bytes and available_memory_bytes()) from error
    assert executable.block_size == BLOCK_SIZE
    return LoadedModel(
        checkpoint=checkpoint,
        config=config,
        settings=settings_of(checkpoint, config),
        tokenizer=tokenizer,
        executable=executable,
        weights=blueprint.weights,
        context_length=blueprint.context_length,
        footprint=capacity.footprint,
        target_rules=target_rules,
        own_target_tokenizer=target_tokenizer,
    )


def _renormalized(checkpoint: Checkpoint, graph: Graph, rules: TargetRules) -> Checkpoint:
    """With logits of suppressed tokens so low that the others' log-probabilities are as if there were none:
    what `renormalize_logits` comes to.

    Raises:
        UnsupportedError: the head has no bias that could say so.
    """
    if not rules.renormalizes:
        return checkpoint
    head = graph.head()
    if head is None or head.bias is None:
        raise UnsupportedError(
            f"{checkpoint.path}: renormalize_logits=True of its generation settings is not supported beside "
            "tokens that are suppressed, as its head has no bias",
            hint="take it out of generation_config.json to have the model write without it",
        )
    (name,) = head.bias.names
    bias = to_f32(checkpoint.tensors[name]).copy()
    bias[list(rules.suppressed_token_ids)] = _NEVER
    tensor = StoredTensor(name, TensorFormat.F32, bias.shape, bias.view(np.uint8))
    return replace(checkpoint, tensors={**checkpoint.tensors, name: tensor})


def graph_of(model: LoadedModel) -> Graph:
    """The graph of a model, before any pass; of an encoder-decoder both its graphs."""
    graph = _build(model.checkpoint, model.config)
    encoder = build_source_encoder(model.config, model.checkpoint.tensors.keys())
    return graph if encoder is None else graph.beside(encoder)


def _build(checkpoint: Checkpoint, config: ModelConfig) -> Graph:
    return build_graph(config, checkpoint.tensors.keys(), ending=read_ending(checkpoint, config))


def choose_weights(options: EngineOptions, *, generates: bool, has_integers: bool) -> WeightFormat:
    """What `auto` comes to: see EngineOptions."""
    if options.weights != "auto":
        return options.weights
    if options.backend != "native":
        return "f32"
    return "int8" if generates else "stored" if has_integers else "f32"


def model_context(checkpoint: Checkpoint, config: ModelConfig) -> int:
    """Encoders may be made for shorter texts than their position table holds; a prefix takes positions from
    those of texts."""
    context = config.max_context
    if (prefix := read_prefix(checkpoint.config)) is not None:
        context -= prefix.num_tokens
    if context < 1:
        raise CheckpointError(
            f"{checkpoint.path} has {config.max_context} positions, which its prefix leaves none of",
            hint="tune a shorter prefix: prefix_tokens",
        )
    if checkpoint.sentence and checkpoint.sentence.max_tokens:
        return min(context, checkpoint.sentence.max_tokens)
    return context


def _usual_context(checkpoint: Checkpoint, config: ModelConfig) -> int:
    context = model_context(checkpoint, config)
    if isinstance(config, EncoderConfig):
        return context
    usual = config.usual_context
    if (prefix := read_prefix(checkpoint.config)) is not None:
        usual = max(usual - prefix.num_tokens, 1)
    return min(context, usual)


def settings_of(checkpoint: Checkpoint, config: ModelConfig) -> TaskSettings:
    return read_task(checkpoint.config, checkpoint.card, is_decoder=not isinstance(config, EncoderConfig))


def read_ending(checkpoint: Checkpoint, config: ModelConfig) -> Ending | None:
    """The head of a model, or how it makes an embedding; None of what writes text."""
    sentence = checkpoint.sentence
    if (head := settings_of(checkpoint, config).head) is not None:
        return head
    return Pooling.from_sentence_transformers(sentence.modules, sentence.pooling) if sentence else None


def _compile(blueprint: Blueprint, checkpoint: Checkpoint, options: EngineOptions) -> Executable:
    capacity = blueprint.capacity
    if capacity.layout is None:
        return _compile_torch(blueprint, checkpoint, options)
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
        encoder=capacity.encoder_layout,
    )


def _compile_torch(blueprint: Blueprint, checkpoint: Checkpoint, options: EngineOptions) -> Executable:
    try:
        from fastserve.backends.torch.executable import compile_torch
    except ImportError as error:
        raise UnsupportedError(
            f"backend='torch' needs PyTorch: {error}", hint="install torch, or use backend='native'"
        ) from error
    graph, encoder = blueprint.graph, blueprint.encoder
    nodes = graph.nodes if encoder is None else (*graph.nodes, *encoder.nodes)
    names = {name for node in nodes for parameter in node.parameters() for name in parameter.names}
    return compile_torch(
        graph,
        {name: to_f32(checkpoint.tensors[name]) for name in names},
        limits=blueprint.capacity.limits,
        kv_dtype=options.kv_dtype,
        block_size=BLOCK_SIZE,
        device=options.device or "cpu",
        encoder=encoder,
    )
