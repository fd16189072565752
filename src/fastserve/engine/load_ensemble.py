"""The members of an ensemble, loaded one after the other, as one model."""

from __future__ import annotations

from dataclasses import fields, replace

from fastserve.checkpoint.checked_tensors import Check, checked
from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.config import EngineOptions
from fastserve.engine.blueprint import draw, load_single, open_model, settings_of
from fastserve.engine.ensemble import EnsembleFolder
from fastserve.engine.footprint import Footprint
from fastserve.engine.loaded_model import Ensemble, LoadedModel, ModelPlan, check_task
from fastserve.engine.mix import Mix
from fastserve.errors import UnsupportedError
from fastserve.models.family import ModelConfig
from fastserve.models.task import Task


def plan_ensemble(
    folder: EnsembleFolder, options: EngineOptions, name: str, available_bytes: int | None
) -> ModelPlan:
    opened, _ = _open_members(folder, options, name)
    own_options = _member_options(folder, options)
    drawn = [draw(*own, own_options, available_bytes) for own in opened]
    return ModelPlan(
        settings=folder.settings,
        context_length=min(blueprint.context_length for blueprint in drawn),
        kv_bytes=0,
        total_bytes=sum(blueprint.capacity.footprint.total_bytes for blueprint in drawn),
    )


def load_ensemble(
    folder: EnsembleFolder, options: EngineOptions, name: str, task: Task | None, check: Check | None = None
) -> LoadedModel:
    """Arguments and errors as of `fastserve.engine.load.load_model`."""
    if task is not None:
        check_task(task, folder.settings, name)
    opened, mix = _open_members(folder, options, name)
    own_options = _member_options(folder, options)
    members: list[LoadedModel] = []
    for index, (checkpoint, config) in enumerate(opened):
        # What those before have been promised, and have not touched but for their weights.
        reserved_bytes = sum(m.footprint.kv_bytes + m.footprint.activation_bytes for m in members)
        own = checked(checkpoint, check)
        loaded = load_single(own, config, own_options, reserved_bytes=reserved_bytes)
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
    opened = [open_model(path) for path in folder.members]
    return opened, folder.make_mix([settings_of(*own) for own in opened])


def _member_options(folder: EnsembleFolder, options: EngineOptions) -> EngineOptions:
    """Members share the memory for keys and values that the options name, and have no adapters."""
    options = options.without_adapters()
    if options.kv_memory_bytes is None:
        return options
    return replace(options, kv_memory=options.kv_memory_bytes // len(folder.members))
