"""What a step costs that decodes and verifies: the fitted line, corrected by steps of the same rows.

Kernels take rows in tiles, so that the ninth may cost more than the eight after it; a line does not tell.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.engine.cost import OnlineStepCost, StepWork

_LEAST_ROW_SHARE = 0.02  # of a step's seconds: no draft is cheaper, whatever the fit says
_FORGETTING = 0.995  # an observation, of those before it: what was once dear is tried again after hundreds
_MEMORY = 20.0  # steps of the same rows that count
_LEAST_RATIO, _GREATEST_RATIO = 0.5, 2.0  # of a single step; beyond, the machine was somewhere else


@dataclass(slots=True)
class _Ratio:
    """Measured over fitted seconds: the mean of `weight` steps, as of a step."""

    mean: float
    weight: float
    step: int


class VerificationCost:
    """Seconds of steps without prompts, by their decodes and drafts.

    >>> from fastserve.engine.cost import StepCost
    >>> cost = VerificationCost(OnlineStepCost(StepCost(fixed_seconds=0.01, draft_seconds=0.001)))
    >>> decodes = StepWork(decode_tokens=1)
    >>> before = cost.seconds(decodes, 2)
    >>> for _ in range(30):
    ...     cost.observe(StepWork(decode_tokens=1, draft_tokens=1), 0.02)
    >>> cost.seconds(decodes, 2) > 1.3 * before
    True

    Args:
        cost: the fit; its queries are read, nothing is observed.
    """

    def __init__(self, cost: OnlineStepCost) -> None:
        self._cost = cost
        self._ratios: dict[tuple[int, int], _Ratio] = {}  # by decodes and drafts
        self._step = 0

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learn from a step that ran; of one with prompts nothing is learned."""
        self._step += 1
        if work.prefill_tokens or not work.decode_tokens:
            return
        fitted = self.fitted_seconds(work)
        if fitted <= 0:
            return
        ratio = min(max(seconds / fitted, _LEAST_RATIO), _GREATEST_RATIO)
        known = self._ratios.setdefault(
            (work.decode_tokens, work.draft_tokens), _Ratio(ratio, 0.0, self._step)
        )
        weight = min(known.weight * _FORGETTING ** (self._step - known.step), _MEMORY)
        known.mean = (weight * known.mean + ratio) / (weight + 1)
        known.weight, known.step = weight + 1, self._step

    def seconds(self, decodes: StepWork, num_drafts: int) -> float:
        """Of a step of these decodes with so many drafts."""
        return self.curve(decodes, num_drafts)[-1]

    def curve(self, decodes: StepWork, num_drafts: int) -> list[float]:
        """Seconds with 0, 1, ..., `num_drafts` drafts. Where none was seen with so many, the correction is
        that for fewer."""
        base = self.fitted_seconds(decodes)
        draft_seconds = self.draft_seconds(decodes)
        ratio = 1.0
        seconds = []
        for count in range(num_drafts + 1):
            known = self._ratios.get((decodes.decode_tokens, count))
            if known is not None:
                weight = known.weight * _FORGETTING ** (self._step - known.step)
                ratio = (weight * known.mean + ratio) / (weight + 1)
            seconds.append((base + count * draft_seconds) * ratio)
        return seconds

    def draft_seconds(self, decodes: StepWork) -> float:
        """Of one more draft, by the line."""
        return max(self._cost.model.draft_seconds, _LEAST_ROW_SHARE * self._cost.model.seconds(decodes))

    def fitted_seconds(self, work: StepWork) -> float:
        """Of any step, by the line."""
        model = self._cost.model
        seconds = model.seconds(work)
        if not work.draft_tokens:
            return seconds
        without = seconds - model.draft_seconds * work.draft_tokens
        return without + work.draft_tokens * max(model.draft_seconds, _LEAST_ROW_SHARE * without)
