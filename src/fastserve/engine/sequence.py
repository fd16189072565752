"""One request inside the engine: its tokens, how many of them are computed, and the blocks that hold them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from fastserve.engine.completion import Completion, FinishReason, TokenLogprobs
from fastserve.engine.text import CompletionText
from fastserve.types import SamplingParams


class Status(Enum):
    WAITING = "waiting"  # has no blocks
    RUNNING = "running"  # owns the blocks of its whole length
    FINISHED = "finished"  # completed or aborted; has no blocks


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """Invariant: num_computed_tokens <= len(token_ids) <= num_prompt_tokens + max_tokens."""

    sequence_id: int
    token_ids: list[int]  # the prompt, then the completion so far
    num_prompt_tokens: int
    max_tokens: int  # of the completion
    params: SamplingParams
    seed: int
    text: CompletionText
    arrival_seconds: float
    status: Status = Status.WAITING
    num_computed_tokens: int = 0  # how many have their keys and values in the blocks
    block_table: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    first_token_seconds: float | None = None

    @property
    def max_length(self) -> int:
        """Tokens that it can grow to."""
        return self.num_prompt_tokens + self.max_tokens

    @property
    def num_completion_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether one row is all it needs for its next token."""
        return self.num_uncomputed_tokens == 1

    def complete(self, last_text: str, finish_reason: FinishReason, now: float) -> Completion:
        """The whole of it, once its last token and text are known."""
        assert self.first_token_seconds is not None
        decode_seconds = now - self.first_token_seconds
        return Completion(
            text="".join((*self.texts, last_text)),
            token_ids=tuple(self.token_ids[self.num_prompt_tokens :]),
            finish_reason=finish_reason,
            prompt_tokens=self.num_prompt_tokens,
            seed=self.seed,
            logprobs=None if self.params.logprobs is None else tuple(self.logprobs),
            time_to_first_token_seconds=self.first_token_seconds - self.arrival_seconds,
            decode_tokens_per_second=(
                (self.num_completion_tokens - 1) / decode_seconds if decode_seconds > 0 else None
            ),
        )
