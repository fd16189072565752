"""What a loaded decoder is served by: its engine, and the compiler of its requests' constraints."""

from __future__ import annotations

from dataclasses import replace

from fastserve.config import EngineOptions
from fastserve.engine.draft_model import DraftModel
from fastserve.engine.engine import Engine
from fastserve.engine.guide import ConstraintCompiler
from fastserve.engine.loaded_model import LoadedModel
from fastserve.engine.mover import make_mover
from fastserve.engine.policy.work import LengthPredictor
from fastserve.engine.turnstile import Turnstile
from fastserve.hub.resolve import resolve


def resolve_draft(options: EngineOptions, *, offline: bool) -> EngineOptions:
    """The options, with the folder of their draft model for its name. Raises as `resolve`."""
    if options.draft_model is None:
        return options
    return replace(options, draft_model=resolve(options.draft_model, offline=offline))


def make_engine(
    model: LoadedModel,
    options: EngineOptions,
    *,
    length_predictor: LengthPredictor | None = None,
    turnstile: Turnstile | None = None,
) -> Engine:
    """The engine of a decoder, with its slow tier. Raises as `make_mover` and `make_policy`."""
    return Engine(
        model.executable,
        eos_token_ids=model.checkpoint.eos_token_ids,
        make_decoder=model.target_tokenizer.stream_decoder,
        context_length=model.context_length,
        options=options,
        mover=make_mover(model.executable, options),
        length_predictor=length_predictor,
        draft_model=DraftModel(model.draft.executable) if model.draft else None,
        target_rules=model.target_rules,
        turnstile=turnstile,
    )


def make_constraint_compiler(model: LoadedModel) -> ConstraintCompiler:
    """What compiles the constraints of a decoder's requests."""
    return ConstraintCompiler(
        model.target_tokenizer,
        vocab_size=model.executable.vocab_size,
        eos_token_ids=model.checkpoint.eos_token_ids,
    )
