"""What generation_config.json says of how a decoder of sources writes: which tokens may come, and how it
searches where a request leaves that to the model.

Names and meanings are those of `transformers` (GenerationConfig and logits_process.py of version 5).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from fastserve.checkpoint.file import read_optional_json
from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.types import SEARCH_OPTIONS, EarlyStopping, JsonObject, SamplingParams, can_search

logger = logging.getLogger(__name__)

# Settings by which `transformers` writes something else, with what is no change.
_NOT_HONOURED: dict[str, object] = {
    "begin_suppress_tokens": [],
    "constraints": [],
    "diversity_penalty": 0.0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "exponential_decay_length_penalty": [],
    "force_words_ids": [],
    "forced_decoder_ids": [],
    "guidance_scale": 1.0,
    "num_beam_groups": 1,
    "penalty_alpha": 0.0,
    "repetition_penalty": 1.0,
    "sequence_bias": {},
}
# Of config.json as well where there is a generation_config.json without them.
_TOKENS = (
    "decoder_start_token_id",
    "bos_token_id",
    "eos_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
)
_NGRAM_CANDIDATES = 4  # of a beam's likeliest tokens, so many may be bans of repeated n-grams


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRules:
    """How targets begin, go on and end, whatever is asked for; and the search of requests that name none.

    Attributes:
        start_token_id: stands before the first token of every target, and is no part of it.
        forced_bos_token_id: the first token; None: the model chooses it.
        forced_eos_token_id: the last token where a target is as long as may be; None: the model chooses it.
        suppressed_token_ids: that no target has.
        banned_words: several tokens each, that no target has in a row.
        no_repeat_ngram_size: no so many tokens in a row come twice; 0: they may.
        min_tokens: before these have come, none of `eos_token_ids` does.
        renormalizes: log-probabilities of a search are those among tokens that may come.
        num_beams, length_penalty, early_stopping: of requests that leave it to the model.
    """

    start_token_id: int
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    suppressed_token_ids: tuple[int, ...] = ()
    banned_words: tuple[tuple[int, ...], ...] = ()
    no_repeat_ngram_size: int = 0
    min_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()
    renormalizes: bool = False
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False

    def forced(self, index: int, max_tokens: int) -> int | None:
        """The token that stands at `index` of a target of at most `max_tokens`; None: the model chooses."""
        if index == 0 and self.forced_bos_token_id is not None:
            return self.forced_bos_token_id
        return self.forced_eos_token_id if index == max_tokens - 1 else None

    def banned(self, token_ids: Sequence[int]) -> Collection[int]:
        """What may not follow these tokens, the start among them.

        >>> rules = TargetRules(start_token_id=0, suppressed_token_ids=(9,), no_repeat_ngram_size=2)
        >>> sorted(rules.banned([0, 5, 6, 5]))
        [6, 9]
        """
        if not self._depends_on_tokens:
            return self.suppressed_token_ids
        found = set(self.suppressed_token_ids)
        if len(token_ids) - 1 < self.min_tokens:
            found.update(self.eos_token_ids)
        for *beginning, last in self.banned_words:
            if list(token_ids[len(token_ids) - len(beginning) :]) == beginning:
                found.add(last)
        if self.no_repeat_ngram_size:
            found |= _repeating(token_ids, self.no_repeat_ngram_size)
        return found

    @property
    def num_spare(self) -> int:
        """Of a beam's likeliest tokens, how many may be such as may not come."""
        ends = len(self.eos_token_ids) if self.min_tokens else 0
        repeats = _NGRAM_CANDIDATES if self.no_repeat_ngram_size else 0
        return len(self.suppressed_token_ids) + len(self.banned_words) + ends + repeats

    def with_search(self, params: SamplingParams) -> SamplingParams:
        """Parameters that leave the search to the model, with its own: where nothing in them speaks against
        one. What they say of its options counts."""
        if params.num_beams is not None:
            return params
        if self.num_beams == 1 or params.n > self.num_beams or not can_search(params):
            return replace(params, num_beams=1)
        own = {"length_penalty": self.length_penalty, "early_stopping": self.early_stopping}
        given = {name: getattr(params, name) for name in own}
        kept = {name: value for name, value in given.items() if value != SEARCH_OPTIONS[name]}
        return replace(params, num_beams=self.num_beams, **{**own, **kept})

    @property
    def _depends_on_tokens(self) -> bool:
        return bool(self.banned_words or self.no_repeat_ngram_size or self.min_tokens)


def read_target_rules(folder: Path, config: JsonObject, *, vocab_size: int) -> TargetRules:
    """Those of generation_config.json, where there is none of config.json.

    Raises:
        CheckpointError: no token begins a target, an id is none of the vocabulary, or a setting is of another
            kind than it should be.
        UnsupportedError: a setting by which other tokens would come, and which is not honoured.
    """
    own = read_optional_json(folder / "generation_config.json")
    values = {**{key: config.get(key) for key in _TOKENS}, **own} if own else config
    return _Settings(folder, values, vocab_size).read()


class _Settings:
    """Of one model."""

    def __init__(self, folder: Path, values: JsonObject, vocab_size: int) -> None:
        self._folder = folder
        self._values = values
        self._vocab_size = vocab_size

    def read(self) -> TargetRules:
        self._refuse_unknown()
        start = self._token_id("decoder_start_token_id")
        start = self._token_id("bos_token_id") if start is None else start
        if start is None:
            raise CheckpointError(
                f"{self._folder}: generation_config.json and config.json have no decoder_start_token_id",
                hint="take the model from its source again, all files together",
            )
        words, eos_token_ids = self._bad_words(), self._eos_token_ids()
        single = [word[0] for word in words if len(word) == 1 and word[0] not in eos_token_ids]
        suppressed = tuple(sorted({*single, *self._token_ids("suppress_tokens")}))
        # `transformers` counts the token that begins a target among those of min_length.
        least = max(self._count("min_length") - 1, self._count("min_new_tokens"), 0)
        rules = TargetRules(
            start_token_id=start,
            forced_bos_token_id=self._token_id("forced_bos_token_id"),
            forced_eos_token_id=self._token_id("forced_eos_token_id"),
            suppressed_token_ids=suppressed,
            banned_words=tuple(word for word in words if len(word) > 1),
            no_repeat_ngram_size=self._count("no_repeat_ngram_size"),
            min_tokens=least,
            eos_token_ids=eos_token_ids,
            renormalizes=bool(self._flag("renormalize_logits")) and bool(suppressed),
            num_beams=self._count("num_beams", default=1) or 1,
            length_penalty=self._length_penalty(),
            early_stopping=self._early_stopping(),
        )
        if rules.no_repeat_ngram_size == 1:  # no beam's likeliest tokens would be enough
            self._refuse("no_repeat_ngram_size")
        if rules._depends_on_tokens and self._flag("renormalize_logits"):
            self._refuse("renormalize_logits", "beside minimal lengths and bans of several tokens")
        return rules

    def _refuse_unknown(self) -> None:
        for key, plain in _NOT_HONOURED.items():
            value = self._values.get(key)
            if value is not None and value != plain and value not in ([], {}, 0):
                self._refuse(key)

    def _refuse(self, key: str, where: str = "") -> None:
        raise UnsupportedError(
            f"{self._folder}: {key}={self._values[key]!r:.80} of its generation settings is not supported"
            f"{' ' if where else ''}{where}",
            hint="take it out of generation_config.json to have the model write without it",
        )

    def _token_id(self, key: str) -> int | None:
        value = self._values.get(key)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is not None and not self._is_token(value):
            raise CheckpointError(
                f"{self._folder}: {key} is {value!r:.80}; token ids are 0 to {self._vocab_size - 1}"
            )
        return value

    def _eos_token_ids(self) -> tuple[int, ...]:
        """Those that are of the vocabulary; others never come."""
        found = self._values.get("eos_token_id")
        return tuple(id_ for id_ in (found if isinstance(found, list) else [found]) if self._is_token(id_))

    def _token_ids(self, key: str) -> list[int]:
        return [self._checked(id_) for id_ in self._listed(key)]

    def _bad_words(self) -> list[tuple[int, ...]]:
        words = self._listed("bad_words_ids")
        if not all(isinstance(word, list) and word for word in words):
            raise CheckpointError(
                f"{self._folder}: bad_words_ids is {words!r:.80}, lists of tokens were expected"
            )
        return [tuple(self._checked(id_) for id_ in word) for word in words]

    def _listed(self, key: str) -> list[Any]:
        value = self._values.get(key)
        if value is not None and not isinstance(value, list):
            raise CheckpointError(f"{self._folder}: {key} is {value!r:.80}, a list was expected")
        return value or []

    def _checked(self, id_: object) -> int:
        if not self._is_token(id_):
            most = self._vocab_size - 1
            raise CheckpointError(
                f"{self._folder}: a suppressed token is {id_!r:.80}; token ids are 0 to {most}"
            )
        return id_

    def _count(self, key: str, default: int = 0) -> int:
        value = self._values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise CheckpointError(f"{self._folder}: {key} is {value!r:.80}, a whole number was expected")
        return value

    def _flag(self, key: str) -> bool:
        value = self._values.get(key)
        if value is not None and not isinstance(value, bool):
            raise CheckpointError(f"{self._folder}: {key} is {value!r:.80}, true or false was expected")
        return bool(value)

    def _length_penalty(self) -> float:
        value = self._values.get("length_penalty")
        if value is None:
            return 1.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"{self._folder}: length_penalty is {value!r:.80}, a number was expected")
        return float(value)

    def _early_stopping(self) -> EarlyStopping:
        value = self._values.get("early_stopping")
        if value == "never":
            return "never"
        return self._flag("early_stopping")

    def _is_token(self, value: object) -> TypeGuard[int]:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < self._vocab_size


def _repeating(token_ids: Sequence[int], size: int) -> set[int]:
    """What would make the last `size` tokens, two or more, such as have come before."""
    beginning = list(token_ids[len(token_ids) - size + 1 :])
    starts = range(len(token_ids) - size + 1)
    return {token_ids[at + size - 1] for at in starts if list(token_ids[at : at + size - 1]) == beginning}
