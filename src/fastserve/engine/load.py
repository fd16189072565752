"""From a path to a model that runs, with its draft model or as an ensemble."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fastserve.checkpoint.checked_tensors import Check, checked
from fastserve.config import EngineOptions
from fastserve.engine.available_memory import available_memory_bytes
from fastserve.engine.blueprint import draw, load_single, open_model, settings_of
from fastserve.engine.ensemble import open_ensemble
from fastserve.engine.load_draft import draft_options, load_draft, open_draft
from fastserve.engine.load_ensemble import load_ensemble, plan_ensemble
from fastserve.engine.loaded_model import LoadedModel, ModelPlan, check_task
from fastserve.errors import UnsupportedError
from fastserve.models.config import EncoderDecoderConfig
from fastserve.models.family import ModelConfig
from fastserve.models.task import Task, TaskSettings


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
        return plan_ensemble(folder, options, name or str(path), available_bytes)
    checkpoint, config = open_model(path)
    _check_options(config, options, name or str(path))
    draft = open_draft(checkpoint, config, options, name or str(path))
    blueprint = draw(checkpoint, config, options, available_bytes)
    footprint = blueprint.capacity.footprint
    total_bytes = footprint.total_bytes
    if draft is not None:
        own_options = draft_options(*draft, options, footprint, blueprint.context_length)
        total_bytes += draw(*draft, own_options, available_bytes).capacity.footprint.total_bytes
    return ModelPlan(
        settings=settings_of(checkpoint, config),
        context_length=blueprint.context_length,
        kv_bytes=footprint.kv_bytes,
        total_bytes=total_bytes,
    )


def load_model(
    path: Path,
    options: EngineOptions,
    *,
    name: str | None = None,
    task: Task | None = None,
    check: Check | None = None,
) -> LoadedModel:
    """Load the model in a folder or .gguf file, and its draft model. Messages call it `name`, by default its
    path.

    Args:
        check: called before each tensor is read; what it raises ends the load.

    Raises:
        UnsupportedError: it is not made for `task`, or its draft model has another vocabulary; said before
            weights are read.
        CheckpointError, UnsupportedError: it cannot be read, or has something that we do not compute.
        ContextLengthError: `context_length` is beyond the model's own.
        MemoryLimitError: it needs more memory than there is; said before weights are read.
    """
    if (folder := open_ensemble(path)) is not None:
        return load_ensemble(folder, options, name or str(path), task, check)
    checkpoint, config = open_model(path)
    checkpoint = checked(checkpoint, check)
    if task is not None:
        check_task(task, settings_of(checkpoint, config), name or str(path))
    _check_options(config, options, name or str(path))
    draft = open_draft(checkpoint, config, options, name or str(path))
    model = load_single(checkpoint, config, options)
    if draft is None:
        return model
    draft_checkpoint, draft_config = draft
    loaded_draft = load_draft(checked(draft_checkpoint, check), draft_config, options, model)
    return replace(model, draft=loaded_draft)


def read_settings(path: Path) -> TaskSettings:
    """What the model in a folder or .gguf file is for. Raises as `load_model`, of what its files say."""
    folder = open_ensemble(path)
    return settings_of(*open_model(path)) if folder is None else folder.settings


def _check_options(config: ModelConfig, options: EngineOptions, name: str) -> None:
    """
    Raises:
        UnsupportedError: tokens are to be guessed of a model that is no decoder by itself.
    """
    if not isinstance(config, EncoderDecoderConfig):
        return
    if options.speculation != "off":
        raise UnsupportedError(
            f"the model {name!r} is an encoder-decoder, for which there is no"
            f" speculation={options.speculation!r}",
            hint="leave speculation out",
        )
