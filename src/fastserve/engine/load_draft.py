"""The draft model of a model that guesses with one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.config import EngineOptions
from fastserve.engine.blueprint import load_single, model_context, open_model, settings_of
from fastserve.engine.footprint import Footprint
from fastserve.engine.loaded_model import LoadedModel, check_task
from fastserve.errors import MemoryLimitError, OptionError, UnsupportedError
from fastserve.models.config import DecoderConfig
from fastserve.models.family import ModelConfig

_DRAFT_KV_SHARE = 4  # a draft model has a fourth of the model's KV memory, unless options say otherwise


def open_draft(
    checkpoint: Checkpoint, config: ModelConfig, options: EngineOptions, name: str
) -> tuple[Checkpoint, DecoderConfig] | None:
    """The draft model of a model, where the options ask for one."""
    if options.speculation != "draft":
        return None
    check_task("generate", settings_of(checkpoint, config), name)
    draft_checkpoint, draft_config = (
        (checkpoint, config) if options.draft_model is None else open_model(Path(options.draft_model))
    )
    draft_config = _check_draft_config(draft_checkpoint, draft_config, options, name)
    _check_vocabulary(checkpoint, config, draft_checkpoint, draft_config)
    return draft_checkpoint, draft_config


def _check_draft_config(
    checkpoint: Checkpoint, config: ModelConfig, options: EngineOptions, name: str
) -> DecoderConfig:
    """The config of a draft model, of its first layers where the options say so."""
    draft_name = name if options.draft_model is None else str(options.draft_model)
    check_task("generate", settings_of(checkpoint, config), draft_name)
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


def load_draft(
    checkpoint: Checkpoint, config: DecoderConfig, options: EngineOptions, model: LoadedModel
) -> LoadedModel:
    """Load the draft model of a model that is loaded."""
    footprint = model.footprint  # of which nothing has been touched but the weights
    own_options = draft_options(checkpoint, config, options, footprint, model.context_length)
    reserved_bytes = footprint.kv_bytes + footprint.activation_bytes
    try:
        return load_single(checkpoint, config, own_options, reserved_bytes=reserved_bytes)
    except MemoryLimitError as error:
        raise MemoryLimitError(
            f"of the draft model: {error.message}",
            hint="choose a smaller draft_model, fewer draft_layers, another draft_kv_memory, or free memory",
        ) from error


def draft_options(
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
        options.without_adapters(),
        weights=options.draft_weights,
        kv_memory=footprint.kv_bytes // _DRAFT_KV_SHARE if kv_bytes is None else kv_bytes,
        context_length=min(context_length, model_context(checkpoint, config)),
    )
