"""What the engine gives back: chunks as tokens are chosen, and the completion that the last chunk carries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from fastserve.errors import DeadlineError, StepError

FinishReason = Literal["stop", "length", "error"]
"""Why a completion ended.

`stop`: by an end-of-sequence token, one of `stop_token_ids` or a stop string.
`length`: it has `max_tokens`, or the context is full.
`error`: it could not go on; the completion's `error` says why.
"""


NO_TOKEN = "the model computed logits that are not numbers"
"""The error of a completion whose next token cannot be chosen: all logits are NaN or -inf."""

NO_ALLOWED_TOKEN = "no token that its constraint allows has a probability"
"""The same, of a completion with a constraint."""

NO_BEAM = "of the likeliest tokens its model's settings leave none"
"""What a search says whose beams all end without a text."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one position, by the model itself (before filters and temperature)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the most probable tokens with theirs, best first


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished request.

    `token_ids` has the token that ended it; `text` has neither that token nor the stop string.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int = 0  # of the prompt's, found in the cache of prefixes instead of being computed
    seed: int  # drawn for the request where it named none; repeats the completion
    logprobs: tuple[TokenLogprobs, ...] | None  # one a token, where asked for
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None  # of the prompt, from its second token on
    queue_seconds: float  # from the request's arrival to the step of its first turn
    total_seconds: float  # from the request's arrival to the completion's end
    time_to_first_token_seconds: float  # from the request's arrival, waiting included
    decode_tokens_per_second: float | None  # after the first token; None for a single token
    service_seconds: float = 0.0  # its share of the steps that it was in: their seconds by their sequences
    index: int = 0  # among the completions of its request
    stop_string: str | None = None  # the one that ended it
    error: str | None = None  # why it could not go on
    has_expired: bool = False  # it ended by an error because it took too long, or waited too long

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)

    def checked(self) -> Self:
        """The completion itself.

        Raises:
            DeadlineError: it took too long, or waited too long for its first turn.
            StepError: it ended by another error.
        """
        if self.has_expired:
            raise DeadlineError(
                f"after {self.completion_tokens} tokens {self.error}",
                hint="allow more time, or send it when less is waiting",
            )
        if self.error is not None:
            raise StepError(
                f"after {self.completion_tokens} tokens {self.error}",
                hint="take the model from its source again; where weights or KV are 16-bit, try f32"
                if self.error == NO_TOKEN
                else None,
            )
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One token of a completion and the text that became certain with it (empty while text is held back)."""

    request_id: int
    token_id: int | None  # None where the completion ends by an error, or has no tokens
    text: str
    logprobs: TokenLogprobs | None
    completion: Completion | None  # of the last chunk: the whole
    index: int = 0  # among the completions of its request
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None  # of the first chunk, where asked for
    service_seconds: float = 0.0  # since the completion's chunk before: together they are the completion's
