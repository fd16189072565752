"""What generation_config.json says of the tokens that a decoder of sources writes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastserve.checkpoint.file import read_optional_json
from fastserve.errors import CheckpointError
from fastserve.types import JsonObject

logger = logging.getLogger(__name__)

# Settings by which `transformers` writes something else, with what is no change.
_NOT_HONOURED = {
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRules:
    """How targets begin and end, whatever is asked for.

    Attributes:
        start_token_id: stands before the first token of every target, and is no part of it.
        forced_bos_token_id: the first token; None: the model chooses it.
        forced_eos_token_id: the last token where a target is as long as may be; None: the model chooses it.
        suppressed_token_ids: that no target has.
    """

    start_token_id: int
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    suppressed_token_ids: tuple[int, ...] = ()

    def forced(self, index: int, max_tokens: int) -> int | None:
        """The token that stands at `index` of a target of at most `max_tokens`; None: the model chooses."""
        if index == 0 and self.forced_bos_token_id is not None:
            return self.forced_bos_token_id
        return self.forced_eos_token_id if index == max_tokens - 1 else None


def read_target_rules(folder: Path, config: JsonObject, *, vocab_size: int) -> TargetRules:
    """Those of generation_config.json, else of config.json; names as of `transformers.GenerationConfig`.
    Settings that are not honoured are logged.

    Raises:
        CheckpointError: no token begins a target, or an id is none of the vocabulary.
    """
    settings = {**config, **read_optional_json(folder / "generation_config.json")}

    def token_id(key: str) -> int | None:
        value = settings.get(key)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is not None and not _is_token(value, vocab_size):
            raise CheckpointError(f"{folder}: {key} is {value!r}; token ids are 0 to {vocab_size - 1}")
        return value

    start = token_id("decoder_start_token_id")
    start = token_id("bos_token_id") if start is None else start
    if start is None:
        raise CheckpointError(
            f"{folder}: neither generation_config.json nor config.json has a decoder_start_token_id",
            hint="take the model from its source again, all files together",
        )
    for key, plain in _NOT_HONOURED.items():
        if settings.get(key) not in (None, plain):
            logger.warning("%s: %s=%r is not honoured", folder, key, settings[key])
    return TargetRules(
        start_token_id=start,
        forced_bos_token_id=token_id("forced_bos_token_id"),
        forced_eos_token_id=token_id("forced_eos_token_id"),
        suppressed_token_ids=_suppressed(folder, settings, vocab_size),
    )


def _suppressed(folder: Path, settings: JsonObject, vocab_size: int) -> tuple[int, ...]:
    """`bad_words_ids` of one token each, but for those that end a text, and `suppress_tokens`."""
    ends = settings.get("eos_token_id")
    words = _listed(folder, settings, "bad_words_ids")
    single = [word[0] for word in words if isinstance(word, list) and len(word) == 1]
    if len(single) < len(words):
        logger.warning("%s: bad_words_ids of several tokens are not honoured", folder)
    kept = ends if isinstance(ends, list) else [ends]
    found = [id_ for id_ in single if id_ not in kept] + _listed(folder, settings, "suppress_tokens")
    wrong = [id_ for id_ in found if not _is_token(id_, vocab_size)]
    if wrong:
        raise CheckpointError(
            f"{folder}: a suppressed token is {wrong[0]!r:.80}; token ids are 0 to {vocab_size - 1}"
        )
    return tuple(sorted(set(found)))


def _listed(folder: Path, settings: JsonObject, key: str) -> list[Any]:
    value = settings.get(key)
    if value is not None and not isinstance(value, list):
        raise CheckpointError(f"{folder}: {key} is {value!r}, a list was expected")
    return value or []


def _is_token(value: object, vocab_size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size
