"""How many prompt tokens a step takes beside the sequences that decode: what the slack of these allows.

A stream's *pace* is a token within the target of each step. Tokens that come sooner give it slack, which a
later prompt may use up: so a short prompt is read at once beside streams that have been alone, and nobody's
tokens come slower than the pace in the mean. After the dynamic chunks of Niyama, also QoServe (ASPLOS 2026,
arXiv 2503.22562).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from fastserve.engine.cost import OnlineStepCost, StepCost, StepWork
from fastserve.engine.sequence import Sequence

SMALLEST_CHUNK_TOKENS = 16  # prompts go on, however tight the target is
_SLOWDOWN = 1.85  # of a step by prompts, as long as few of them wait
_BACKLOG_SHARE = 1 / 50  # a longer step is granted to a long backlog: so much of it ...
_QUEUE_SHARE = 1 / 8  # ... or so much of what waits behind its longest prompt
_LONGEST_GAP_SECONDS = 0.2
_UNNOTICED_GAP_SECONDS = 0.03  # 33 tokens a second, several times what anybody reads


class PrefillBudget:
    """What the prompts of one step may take, in rows and seconds.

    Nobody gets a chunk of fewer tokens than SMALLEST_CHUNK_TOKENS, unless that is the rest of a prompt; the
    first one gets so many in any case.
    """

    def __init__(self, cost: StepCost, *, rows: int, seconds: float) -> None:
        self._cost = cost
        self._rows = rows
        self._seconds = seconds
        self._is_untouched = True

    @property
    def is_spent(self) -> bool:
        return self._rows <= 0 or (self._seconds <= 0 and not self._is_untouched)

    def fits_whole(self, num_tokens: int) -> bool:
        """Whether there is room for a text that cannot be cut. The first one has it in any case."""
        return self._is_untouched or self.fit(num_tokens, 0) == num_tokens

    def fit(self, num_tokens: int, first_position: int) -> int:
        """How many of a prompt's next tokens there is room for: the later they come, the more keys they
        read."""
        num_tokens = min(num_tokens, self._rows)
        if self._cost.prefill_seconds_of(num_tokens, first_position) <= self._seconds:
            return num_tokens
        # n tokens take linear * n + square * n^2 seconds.
        square = self._cost.prefill_attended_seconds / 2
        linear = self._cost.prefill_seconds + square * (1 + 2 * first_position)
        seconds = max(self._seconds, 0.0)
        slope = linear + math.sqrt(linear**2 + 4 * square * seconds)
        affordable = (
            int(2 * seconds / slope) if slope else 0
        )  # none where tokens cost nothing, and the time is over
        if affordable >= SMALLEST_CHUNK_TOKENS:
            return affordable
        return min(num_tokens, SMALLEST_CHUNK_TOKENS) if self._is_untouched else 0

    def spend(self, num_tokens: int, first_position: int) -> None:
        self._rows -= num_tokens
        self._seconds -= self._cost.prefill_seconds_of(num_tokens, first_position)
        self._is_untouched = False


class Pace:
    """Chooses what a step takes of prompts by what it costs.

    Args:
        cost: of a step; its queries are read, nothing is observed.
        max_tokens: rows of one step.
        target_gap_seconds: how long a step may take while sequences decode, which is the gap between the
            tokens of a stream. None adapts: a step takes 1.85 times what its decodes take alone, 0.03
            seconds if that is less, and where prompts wait behind each other more: an eighth of the time
            that those behind the longest need, or a fiftieth of what all need, up to 0.2 seconds.
        most_slack_seconds: how much slack a stream may save up, by which a step may exceed the target; 0:
            none.
    """

    def __init__(
        self,
        cost: OnlineStepCost,
        *,
        max_tokens: int,
        target_gap_seconds: float | None = None,
        most_slack_seconds: float = 0.0,
    ) -> None:
        self._cost = cost
        self._max_tokens = max_tokens
        self.target_gap_seconds = target_gap_seconds
        self._most_slack_seconds = most_slack_seconds
        self._step_target = 0.0  # of the step whose turns were made last

    def prefill_budget(
        self, decodes: StepWork, backlog_tokens: int, *, longest_tokens: int = 0, slack_seconds: float = 0.0
    ) -> PrefillBudget:
        """Of a step that has these decodes, when so many prompt tokens wait to be computed.

        Args:
            backlog_tokens: of all prompts.
            longest_tokens: of the longest one.
            slack_seconds: the least of the sequences that decode.
        """
        model = self._cost.model
        rows = self._max_tokens - decodes.decode_tokens
        if decodes.decode_tokens == 0:
            self._step_target = 0.0
            return PrefillBudget(model, rows=rows, seconds=math.inf)
        alone = model.seconds(decodes)
        target = self.target_gap_seconds
        if target is None:
            granted = self._granted(backlog_tokens, longest_tokens)
            target = max(_SLOWDOWN * alone, _UNNOTICED_GAP_SECONDS, granted)
        self._step_target = target
        seconds = target + slack_seconds - alone - model.prefill_fixed_seconds
        return PrefillBudget(model, rows=rows, seconds=seconds)

    def _granted(self, backlog_tokens: int, longest_tokens: int) -> float:
        """To prompts that wait: more by each of those that wait behind another, as all of them come later by
        the steps that are made shorter for the streams; a single one is as late by itself."""
        behind = _QUEUE_SHARE * (backlog_tokens - longest_tokens)
        seconds = self._cost.model.prefill_seconds * max(_BACKLOG_SHARE * backlog_tokens, behind)
        return min(seconds, _LONGEST_GAP_SECONDS)

    def give(self, streams: Iterable[Sequence], now: float) -> None:
        """These get a token now, by the step whose budget was asked for last: what their gaps are less than
        its target they save."""
        if not self._most_slack_seconds:
            return
        target, most = self._step_target, self._most_slack_seconds
        for sequence in streams:
            if sequence.last_token_seconds is not None:
                slack = sequence.slack_seconds + target - (now - sequence.last_token_seconds)
                sequence.slack_seconds = min(max(slack, 0.0), most)
