"""From a path to a model that runs: checkpoint, graph, passes, capacities, memory check, backend."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields, replace
from pathlib import Path

from fastserve.backends.native.weight_scheme import choose_schemes
from fastserve.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.generation import TargetRules, read_target_rules
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.config import EngineOptions, WeightFormat
from fastserve.engine.available_memory import available_memory_bytes
from fastserve.engine.capacity import Capacity, choose_context_length, plan_capacity
from fastserve.engine.encoder import Encoder
from fastserve.engine.ensemble import EnsembleFolder, open_ensemble
from fastserve.engine.footprint import BLOCK_SIZE, Footprint
from fastserve.engine.mix import Mix
from fastserve.engine.processor import processor_name
from fastserve.errors import MemoryLimitError, OptionError, UnsupportedError
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
from fastserve.models.task import Task, TaskSettings, read_task
from fastserve.types import Executable, Float64Array

_DRAFT_KV_SHARE = 4  # a draft model has a fourth of the model's KV memory, unless options say otherwise

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to run. `weights` and `context_length` are what the options came to; `draft` guesses at
    its tokens, where the options ask for it; `target_rules` are those of an encoder-decoder, whose executable
    is a SourceExecutable.

    Of an ensemble, `settings`, `context_length` and `footprint` are those of the whole, the rest is that of
    the first member. `member_index` is a member's place in one.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    settings: TaskSettings
    tokenizer: Tokenizer
    executable: Executable
    weights: WeightFormat
    context_length: int
    footprint: Footprint
    target_rules: TargetRules | None = None
    draft: LoadedModel | None = None
    ensemble: Ensemble | None = None
    member_index: int = 0

    @property
    def task(self) -> Task:
        return self.settings.task

    @property
    def reading_length(self) -> int:
        """Tokens to which a text is cut, or cut into windows of: as many as it was tuned with, which it reads
        best, within its context."""
        return min(self.context_length, self.settings.max_length or self.context_length)

    @property
    def members(self) -> tuple[LoadedModel, ...]:
        """Of an ensemble, in their order; a model that is none is its own only one."""
        return (self,) if self.ensemble is None else self.ensemble.members


@dataclass(frozen=True, slots=True)
class Ensemble:
    """Models that predict the same labels, each with its own tokenizer, and how they become one: `mix` is a
    `fastserve.engine.mix.Mix` of what each says."""

    members: tuple[LoadedModel, ...]
    mix: Callable[[Seq[Float64Array]], Float64Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """What loading a model comes to, its draft model included, reckoned before its weights are read."""

    settings: TaskSettings
    context_length: int
    kv_bytes: int  # of the model itself; 0 of an ensemble, whose members are reckoned each for itself
    total_bytes: int

    @property
    def task(self) -> Task:
        return self.settings.task


def plan_model(
    path: Path, options: EngineOptions, *, name: str | None = None, available_bytes: int | None = None
) -> ModelPlan:
    """What `load_model` comes to for these options. Messages call the model `name`, by default its path.

    Args:
        available_bytes: of which options that leave the memory for keys and values open take a part; None: of
            what the machine has.

    Raises:
        As `load_model`, but for MemoryLimitError where there is not enough: that is for the caller to say.
    """
    if available_bytes is None:
        available_bytes = available_memory_bytes()
    if (folder := open_ensemble(path)) is not None:
        return _plan_ensemble(folder, options, name or str(path), available_bytes)
    checkpoint, config = _open(path)
    _check_options(config, options, name or str(path))
    draft = _open_draft(checkpoint, config, options, name or str(path))
    blueprint = _draw(checkpoint, config, options, available_bytes)
    footprint = blueprint.capacity.footprint
    total_bytes = footprint.total_bytes
    if draft is not None:
        own_options = _draft_options(*draft, options, footprint, blueprint.context_length)
        total_bytes += _draw(*draft, own_options, available_bytes).capacity.footprint.total_bytes
    return ModelPlan(
        settings=_settings(checkpoint, config),
        context_length=blueprint.context_length,
        kv_bytes=footprint.kv_bytes,
        total_bytes=total_bytes,
    )


def load_model(
    path: Path, options: EngineOptions, *, name: str | None = None, task: Task | None = None
) -> LoadedModel:
    """Load the model in a folder or .gguf file, and its draft model. Messages call it `name`, by default its
    path.

    Raises:
        UnsupportedError: it is not made for `task`, or its draft model has another vocabulary; said before
            weights are read.
        CheckpointError, UnsupportedError: it cannot be read, or has something that we do not compute.
        ContextLengthError: `context_length` is beyond the model's own.
        MemoryLimitError: it needs more memory than there is; said before weights are read.
    """
    if (folder := open_ensemble(path)) is not None:
        return _load_ensemble(folder, options, name or str(path), task)
    checkpoint, config = _open(path)
    if task is not None:
        check_task(task, _settings(checkpoint, config), name or str(path))
    _check_options(config, options, name or str(path))
    draft = _open_draft(checkpoint, config, options, name or str(path))
    model = _load(checkpoint, config, options)
    return model if draft is None else replace(model, draft=_load_draft(*draft, options, model))


def _open(path: Path) -> tuple[Checkpoint, ModelConfig]:
    """A model on disk, its tensors as its graph takes them."""
    checkpoint = open_checkpoint(path)
    config = read_config(checkpoint.config)
    return replace(checkpoint, tensors=arrange_tensors(config, checkpoint.tensors)), config


def _load(
    checkpoint: Checkpoint, config: ModelConfig, options: EngineOptions, *, reserved_bytes: int = 0
) -> LoadedModel:
    """Load one model. `reserved_bytes` of what looks free are somebody else's."""
    # What another device has is for torch to say, which refuses what does not fit.
    available_bytes = available_memory_bytes() if options.device in (None, "cpu") else None
    if available_bytes is not None:
        available_bytes -= reserved_bytes
    blueprint = _draw(checkpoint, config, options, available_bytes)
    capacity = blueprint.capacity
    if available_bytes is not None:
        capacity.footprint.check(available_bytes)
    try:
        tokenizer = Tokenizer.from_checkpoint(checkpoint)
        target_rules = None
        if isinstance(config, EncoderDecoderConfig):
            folder, vocab_size = checkpoint.path, config.vocab_size
            target_rules = read_target_rules(folder, checkpoint.config, vocab_size=vocab_size)
        executable = _compile(blueprint, checkpoint, options)
    except MemoryError as error:  # others took it meanwhile, or the system grants less than it says
        raise capacity.footprint.to_error(available_bytes and available_memory_bytes()) from error
    assert executable.block_size == BLOCK_SIZE
    return LoadedModel(
        checkpoint=checkpoint,
        config=config,
        settings=_settings(checkpoint, config),
        tokenizer=tokenizer,
        executable=executable,
        weights=blueprint.weights,
        context_length=blueprint.context_length,
        footprint=capacity.footprint,
        target_rules=target_rules,
    )


def read_settings(path: Path) -> TaskSettings:
    """What the model in a folder or .gguf file is for. Raises as `load_model`, of what its files say."""
    folder = open_ensemble(path)
    return _settings(*_open(path)) if folder is None else folder.settings


def _plan_ensemble(
    folder: EnsembleFolder, options: EngineOptions, name: str, available_bytes: int | None
) -> ModelPlan:
    opened, _ = _open_members(folder, options, name)
    own_options = _member_options(folder, options)
    drawn = [_draw(*own, own_options, available_bytes) for own in opened]
    return ModelPlan(
        settings=folder.settings,
        context_length=min(blueprint.context_length for blueprint in drawn),
        kv_bytes=0,
        total_bytes=sum(blueprint.capacity.footprint.total_bytes for blueprint in drawn),
    )


def _load_ensemble(
    folder: EnsembleFolder, options: EngineOptions, name: str, task: Task | None
) -> LoadedModel:
    if task is not None:
        check_task(task, folder.settings, name)
    opened, mix = _open_members(folder, options, name)
    own_options = _member_options(folder, options)
    members: list[LoadedModel] = []
    for index, own in enumerate(opened):
        # What those before have been promised, and have not touched but for their weights.
        reserved_bytes = sum(m.footprint.kv_bytes + m.footprint.activation_bytes for m in members)
        loaded = _load(*own, own_options, reserved_bytes=reserved_bytes)
        members.append(replace(loaded, member_index=index))
    footprints = [member.footprint for member in members]
    return replace(
        members[0],
        settings=folder.settings,
        context_length=min(member.context_length for member in members),
        footprint=Footprint(
            **{
                field.name: sum(getattr(footprint, field.name) for footprint in footprints)
                for field in fields(Footprint)
            }
        ),
        ensemble=Ensemble(tuple(members), mix),
    )


def _open_members(
    folder: EnsembleFolder, options: EngineOptions, name: str
) -> tuple[list[tuple[Checkpoint, ModelConfig]], Mix]:
    """The members of an ensemble called `name`, all of them fit for it, before weights of any are read."""
    if options.speculation == "draft":
        check_task("generate", folder.settings, name)
    if options.adapters:
        raise UnsupportedError(
            f"the model {name!r} is an ensemble, beside which there are no adapters",
            hint="load its members alone, with adapters",
        )
    opened = [_open(path) for path in folder.members]
    return opened, folder.make_mix([_settings(*own) for own in opened])


def _member_options(folder: EnsembleFolder, options: EngineOptions) -> EngineOptions:
    """Members share the memory for keys and values that the options name, and have no adapters."""
    options = replace(options, adapters=None, max_adapters=0)
    if options.kv_memory_bytes is None:
        return options
    return replace(options, kv_memory=options.kv_memory_bytes // len(folder.members))


@dataclass(frozen=True, slots=True)
class _Blueprint:
    """Of a model that is to be compiled."""

    graph: Graph
    encoder: Graph | None  # of an encoder-decoder
    weights: WeightFormat
    context_length: int
    capacity: Capacity


def _draw(
    checkpoint: Checkpoint, config: ModelConfig, options: EngineOptions, available_bytes: int | None
) -> _Blueprint:
    context_length = choose_context_length(
        options,
        model_context(checkpoint, config),
        usual_context=_usual_context(checkpoint, config),
        changes_beyond=isinstance(config, DecoderConfig),
    )
    computed = config.for_context(context_length) if isinstance(config, DecoderConfig) else config
    graph = _build(checkpoint, computed)
    encoder = build_source_encoder(computed, checkpoint.tensors.keys())
    both = graph if encoder is None else graph.beside(encoder)
    for name in check_parameters(both, checkpoint.tensors):
        if config == read_config(checkpoint.config):  # else it is one of the layers that are left out
            logger.info("%s: tensor %s is not used", checkpoint.path, name)
    graph, encoder = optimize(graph), optimize(encoder) if encoder else None
    weights = choose_weights(
        options,
        generates=_settings(checkpoint, config).task == "generate",
        has_integers=any(isinstance(tensor, GroupedTensor) for tensor in checkpoint.tensors.values()),
    )
    capacity = plan_capacity(
        graph,
        options,
        schemes=choose_schemes(graph.beside(encoder) if encoder else graph, weights, checkpoint.tensors),
        context_length=context_length,
        available_bytes=available_bytes,
        encoder=encoder,
    )
    return _Blueprint(graph, encoder, weights, context_length, capacity)


def _check_options(config: ModelConfig, options: EngineOptions, name: str) -> None:
    """
    Raises:
        UnsupportedError: tokens are to be guessed of a model that is no decoder by itself, or there are to
            be adapters beside it.
    """
    if not isinstance(config, EncoderDecoderConfig):
        return
    if options.adapters:
        raise UnsupportedError(
            f"the model {name!r} is an encoder-decoder, beside which there are no adapters",
            hint="merge an adapter into a copy: `fastserve convert MODEL --adapter DIR`",
        )
    if options.speculation != "off":
        raise UnsupportedError(
            f"the model {name!r} is an encoder-decoder, for which there is no"
            f" speculation={options.speculation!r}",
            hint="leave speculation out",
        )


def graph_of(model: LoadedModel) -> Graph:
    """The graph of a model, before any pass."""
    return _build(model.checkpoint, model.config)


def _build(checkpoint: Checkpoint, config: ModelConfig) -> Graph:
    return build_graph(config, checkpoint.tensors.keys(), ending=read_ending(checkpoint, config))


def _open_draft(
    checkpoint: Checkpoint, config: ModelConfig, options: EngineOptions, name: str
) -> tuple[Checkpoint, DecoderConfig] | None:
    """The draft model of a model, where the options ask for one."""
    if options.speculation != "draft":
        return None
    check_task("generate", _settings(checkpoint, config), name)
    draft_checkpoint, draft_config = (
        (checkpoint, config) if options.draft_model is None else _open(Path(options.draft_model))
    )
    draft_config = _check_draft_config(draft_checkpoint, draft_config, options, name)
    _check_vocabulary(checkpoint, config, draft_checkpoint, draft_config)
    return draft_checkpoint, draft_config


def _check_draft_config(
    checkpoint: Checkpoint, config: ModelConfig, options: EngineOptions, name: str
) -> DecoderConfig:
    """The config of a draft model, of its first layers where the options say so."""
    draft_name = name if options.draft_model is None else str(options.draft_model)
    check_task("generate", _settings(checkpoint, config), draft_name)
    if not isinstance(config, DecoderConfig):
        raise UnsupportedError(
            f"the draft model {draft_name!r} is an encoder-decoder, which cannot guess at another's tokens",
            hint="choose a decoder of the same family as the model, or leave speculation out",
        )
    if options.draft_layers is None:
        return config
    if options.draft_layers > config.num_layers:
        raise OptionError(
            f"draft_layers is {options.draft_layers}; the model {draft_name!r} has {config.num_layers}",
            hint=f"choose draft_layers from 1 to {config.num_layers}",
        )
    return replace(config, num_layers=options.draft_layers)


def _check_vocabulary(
    checkpoint: Checkpoint, config: ModelConfig, draft_checkpoint: Checkpoint, draft_config: DecoderConfig
) -> None:
    """
    Raises:
        UnsupportedError: a draft model's tokens are not those of the model.
    """
    if checkpoint is draft_checkpoint:
        return
    sizes = config.vocab_size, draft_config.vocab_size
    difference = f"{sizes[1]} tokens, the model {sizes[0]}" if sizes[0] != sizes[1] else None
    if difference is None:
        tokenizer, draft_tokenizer = map(Tokenizer.from_checkpoint, (checkpoint, draft_checkpoint))
        for token_id in range(sizes[0]):
            texts = tokenizer.token_text(token_id), draft_tokenizer.token_text(token_id)
            if texts[0] != texts[1]:
                difference = f"{texts[1]!r} as token {token_id}, the model {texts[0]!r}"
                break
    if difference is not None:
        raise UnsupportedError(
            f"the draft model {str(draft_checkpoint.path)!r} has another vocabulary: {difference}",
            hint="choose a draft_model of the same family, whose tokenizer is the same",
        )


def _load_draft(
    checkpoint: Checkpoint, config: DecoderConfig, options: EngineOptions, model: LoadedModel
) -> LoadedModel:
    """Load the draft model of a model that is loaded."""
    footprint = model.footprint  # of which nothing has been touched but the weights
    own_options = _draft_options(checkpoint, config, options, footprint, model.context_length)
    reserved_bytes = footprint.kv_bytes + footprint.activation_bytes
    try:
        return _load(checkpoint, config, own_options, reserved_bytes=reserved_bytes)
    except MemoryLimitError as error:
        raise MemoryLimitError(
            f"of the draft model: {error.message}",
            hint="choose a smaller draft_model, fewer draft_layers, another draft_kv_memory, or free memory",
        ) from error


def _draft_options(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    options: EngineOptions,
    footprint: Footprint,
    context_length: int,
) -> EngineOptions:
    """Of the draft model of a model of this footprint: as that has them, but for its weights and its smaller
    pool."""
    kv_bytes = options.draft_kv_memory_bytes
    return replace(
        options,
        weights=options.draft_weights,
        kv_memory=footprint.kv_bytes // _DRAFT_KV_SHARE if kv_bytes is None else kv_bytes,
        context_length=min(context_length, model_context(checkpoint, config)),
        adapters=None,
        max_adapters=0,
    )


def make_encoder(model: LoadedModel) -> Encoder:
    """What runs a model that is no decoder, or all members of an ensemble."""
    first, *others = (member.executable for member in model.members)
    return Encoder(first, model.settings.head, others=others)


def check_task(task: Task, settings: TaskSettings, name: str) -> None:
    """
    Raises:
        UnsupportedError: the model called `name` is not made for the task.
    """
    if settings.can(task):
        return
    made_for = {"generate": "generates text", "embed": "is an encoder"}
    lacks = {"generate": "it does not generate text", "embed": "it has no embeddings"}
    hints = {
        "generate": "use embed, or a language model such as smollm2-135m-instruct",
        "embed": "use an encoder, such as all-minilm-l6-v2",
    }
    raise UnsupportedError(
        f"the model {name!r} {made_for.get(settings.task, f'is for {settings.task}')}; "
        f"{lacks.get(task, f'it has no head for {task}')}",
        hint=hints.get(task, f"use a model that was tuned for {task}"),
    )


def choose_weights(options: EngineOptions, *, generates: bool, has_integers: bool) -> WeightFormat:
    """What `auto` comes to: see EngineOptions."""
    if options.weights != "auto":
        return options.weights
    if options.backend != "native":
        return "f32"
    return "int8" if generates else "stored" if has_integers else "f32"


def model_context(checkpoint: Checkpoint, config: ModelConfig) -> int:
    """Encoders may be made for shorter texts than their position table holds."""
    if checkpoint.sentence and checkpoint.sentence.max_tokens:
        return min(config.max_context, checkpoint.sentence.max_tokens)
    return config.max_context


def _usual_context(checkpoint: Checkpoint, config: ModelConfig) -> int:
    context = model_context(checkpoint, config)
    return context if isinstance(config, EncoderConfig) else min(context, config.usual_context)


def _settings(checkpoint: Checkpoint, config: ModelConfig) -> TaskSettings:
    return read_task(checkpoint.config, checkpoint.card, is_decoder=not isinstance(config, EncoderConfig))


def read_ending(checkpoint: Checkpoint, config: ModelConfig) -> Ending | None:
    """The head of a model, or how it makes an embedding; None of what writes text."""
    sentence = checkpoint.sentence
    if (head := _settings(checkpoint, config).head) is not None:
        return head
    return Pooling.from_sentence_transformers(sentence.modules, sentence.pooling) if sentence else None


def _compile(blueprint: _Blueprint, checkpoint: Checkpoint, options: EngineOptions) -> Executable:
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


def _compile_torch(blueprint: _Blueprint, checkpoint: Checkpoint, options: EngineOptions) -> Executable:
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
