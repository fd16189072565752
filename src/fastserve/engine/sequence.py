"""One completion in the making, as the scheduler sees it: its tokens, how many are computed, where they
lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from fastserve.checkpoint.generation import TargetRules
from fastserve.engine.adapter import ServedAdapter
from fastserve.engine.block import PrefixKey, prefix_key
from fastserve.engine.guide import Guide
from fastserve.types import SamplingParams


class Residence(Enum):
    """Where the keys and values of a sequence are."""

    NOWHERE = "nowhere"  # nothing is computed, or it was dropped and is computed again
    FAST = "fast"  # in the pool: it can run
    LEAVING = "leaving"  # being copied to the slow tier; its blocks are still its own
    SLOW = "slow"  # in the slow tier
    ARRIVING = "arriving"  # being copied back; its blocks are its own, and not yet filled
    FINISHED = "finished"  # completed, failed or aborted: it has nothing


@dataclass(frozen=True, slots=True)
class Source:
    """What an encoder reads for a sequence, in a step of its own: its first tokens, filled up to whole
    blocks, so that what its decoder writes begins a block."""

    num_tokens: int
    num_blocks: int
    num_slots: int  # tokens of these blocks


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """Invariant: num_computed_tokens <= len(token_ids) <= num_prompt_tokens + max_tokens.

    With a `source`, what is called its prompt is that, filled up, and the token that begins its target.

    `rank` and `standing` belong to the scheduling policy: the lower rank goes first, the standing is what the
    policy remembers.
    """

    sequence_id: int
    token_ids: list[int]  # the prompt, then the completion so far
    num_prompt_tokens: int
    max_tokens: int  # of the completion
    source: Source | None = None
    target_rules: TargetRules | None = None
    num_candidates: int = 0  # of a beam: how many of its likeliest next tokens decide
    arrival_seconds: float
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    guide: Guide | None = None  # of its constraint
    adapter: ServedAdapter | None = None  # beside the model
    tenant: str = ""
    endpoint: str = ""  # what it came by: completions of one endpoint are taken to be alike in length
    priority: int = 0  # the lower goes first
    class_index: int = 0  # of its priority class: the lower goes first, whatever the policy
    session: str = ""  # of the tenant's program that it belongs to; "" is none
    deadline_seconds: float | None = None  # by the engine's clock
    scope: PrefixKey = b""  # who shares its prefixes: everybody of the same scope
    forks: list[Sequence] = field(default_factory=list)  # wait for this one's prompt, to go on from it

    residence: Residence = Residence.NOWHERE
    num_computed_tokens: int = 0  # how many have their keys and values in the blocks
    block_table: list[int] = field(default_factory=list)
    slow_blocks: list[int] = field(default_factory=list)  # of the slow tier
    prefix_keys: list[PrefixKey] = field(default_factory=list)  # of its full blocks so far
    num_cached_tokens: int = 0  # of a prefix that was in the cache when it came: expected to be found there
    num_reused_tokens: int = 0  # of the prompt, found in the cache at its first turn
    num_registered: int = 0  # how many of them the pool knows by this sequence
    must_drop: bool = False  # moving it out has failed: it is not tried again
    is_held: bool = False  # its reader is behind: no turn until it has caught up

    rank: Any = 0
    standing: Any = None
    num_scored_tokens: int = 1  # of the prompt, whose logprobs are known; the first token has none
    is_started: bool = False  # it has had a turn
    is_relegated: bool = False  # it cannot be in time any more: those that can go first
    start_seconds: float | None = None  # when the step of its first turn began
    is_complete: bool = False  # its last token has come: it was not aborted, and has not failed or expired
    num_charged_tokens: int = 0  # of the first of its tokens, which its tenant has been charged for
    attained_seconds: float = 0.0  # of the steps in which it had a turn
    service_seconds: float = 0.0  # its share of these: the seconds of a step by the sequences in it
    inherited_seconds: float = 0.0  # attained by its session before it came: to count as its own
    resident_seconds: float = 0.0  # attained since it came into the fast pool
    num_entry_tokens: int = 0  # how many it had when it came there
    last_token_seconds: float | None = None  # when its newest token came, or its reader had caught up
    paused_seconds: float = 0.0  # of its stream, in all: its next token waited while others had turns
    is_insistent: bool = False  # it has been paused for as long as may be: it goes first
    slack_seconds: float = 0.0  # its tokens came so much sooner than their pace
    num_evictions: int = 0  # how often it lost its blocks, moved or dropped
    num_preemptions: int = 0  # how often it was passed over after a turn, before it was finished

    @property
    def num_given_tokens(self) -> int:
        """Of the prompt as its caller gave it."""
        return self.num_prompt_tokens if self.source is None else self.source.num_tokens

    @property
    def target_start(self) -> int:
        """The index of the first token that a decoder reads."""
        return 0 if self.source is None else self.source.num_slots

    @property
    def source_blocks(self) -> list[int]:
        return [] if self.source is None else self.block_table[: self.source.num_blocks]

    @property
    def target_blocks(self) -> list[int]:
        return self.block_table if self.source is None else self.block_table[self.source.num_blocks :]

    @property
    def is_source_unread(self) -> bool:
        """Whether an encoder has yet to read what it follows."""
        return self.num_computed_tokens < self.target_start

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
    def is_to_be_scored(self) -> bool:
        """Whether logprobs of its prompt are asked for, and not all known."""
        return self.params.prompt_logprobs is not None and self.num_scored_tokens < self.num_prompt_tokens

    @property
    def is_read_only(self) -> bool:
        """Whether its prompt is all that is computed: it is complete without a token of its own."""
        return self.max_tokens == 0

    @property
    def has_fixed_length(self) -> bool:
        """Whether nothing but its limit of tokens can end its completion."""
        params = self.params
        return params.ignore_eos and not params.stop and not params.stop_token_ids

    @property
    def is_resident(self) -> bool:
        """Whether it can run."""
        return self.residence is Residence.FAST

    @property
    def is_decoding(self) -> bool:
        """Whether one row is all it needs for its next token."""
        return len(self.token_ids) - self.num_computed_tokens == 1

    def hold(self, now: float, *, is_held: bool) -> None:
        """Its reader is behind, or has caught up: what it makes it wait is no pause."""
        self.is_held = is_held
        if self.last_token_seconds is not None:
            self.last_token_seconds = now

    def keys(self, num_blocks: int, block_size: int) -> list[PrefixKey]:
        """The prefix keys of its first blocks, which are full."""
        assert num_blocks * block_size <= len(self.token_ids)
        while len(self.prefix_keys) < num_blocks:
            start = len(self.prefix_keys) * block_size
            parent = self.prefix_keys[-1] if self.prefix_keys else self.scope
            self.prefix_keys.append(prefix_key(parent, self.token_ids[start : start + block_size]))
        return self.prefix_keys[:num_blocks]
