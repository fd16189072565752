"""What a step costs, as a linear model of its work: stated beforehand, or fitted to the steps that ran."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastserve.types import Float64Array

_FORGETTING = 0.998  # an observation counts half after some 350 steps
_REFIT_STEPS = 16
_DECODES_MEMORY = 0.01  # weight of a step in the mean number of decodes; the first hundred count alike
_OUTLIER = 4.0  # times what was expected; beyond, the machine was somewhere else
_PRIOR_STEPS = 0.1  # how many observations the initial coefficients count for
# Typical sizes of the features, so that the normal equations are well conditioned.
_SCALE = np.array([1.0, 64.0, 16.0, 16384.0, 65536.0, 1.0, 16.0])
_RIDGE = 1e-6  # on the scaled normal equations: features that always go together share what they cost
_LEAST_GRADIENT = 1e-9  # relative, of a feature that is worth having
_MOST_ROUNDS = 3  # of the fit, for each feature
_LEAST_DRAFTS = 0.5  # sum of squares of scaled counts: with less remembered, a draft costs a prompt's row


@dataclass(frozen=True, slots=True)
class StepWork:
    """What the rows of one step add up to.

    Attributes:
        prefill_tokens: rows of prompts.
        decode_tokens: rows that are their sequence's only one and give its next token.
        attended_tokens: over the rows that decode, how many keys each reads; drafts are left out, which read
            what their sequence's row reads.
        draft_tokens: rows that verify a guess at the next tokens.
        prefill_attended_tokens: over the rows of prompts, how many keys each reads: they share what they
            read, so that it costs less.
    """

    prefill_tokens: int = 0
    decode_tokens: int = 0
    attended_tokens: int = 0
    draft_tokens: int = 0
    prefill_attended_tokens: int = 0

    @classmethod
    def of_prefill(cls, num_tokens: int, first_position: int = 0) -> StepWork:
        """Rows of one prompt from a position on; row i reads the keys up to its own.

        >>> StepWork.of_prefill(3, first_position=10).prefill_attended_tokens
        36
        """
        attended = num_tokens * first_position + num_tokens * (num_tokens + 1) // 2
        return cls(prefill_tokens=num_tokens, prefill_attended_tokens=attended)

    @classmethod
    def of_decode(cls, context_length: int) -> StepWork:
        """One row, of a sequence of so many tokens with it."""
        return cls(0, 1, context_length)

    def __add__(self, other: StepWork) -> StepWork:
        return StepWork(
            self.prefill_tokens + other.prefill_tokens,
            self.decode_tokens + other.decode_tokens,
            self.attended_tokens + other.attended_tokens,
            self.draft_tokens + other.draft_tokens,
            self.prefill_attended_tokens + other.prefill_attended_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """seconds = fixed + prefill * prefill_tokens + decode * decode_tokens + attended * attended_tokens
    + draft * draft_tokens + prefill_attended * prefill_attended_tokens, and prefill_fixed where there are any
    prefill_tokens.

    >>> StepCost(fixed_seconds=0.01, prefill_seconds=0.001).seconds(StepWork(prefill_tokens=5))
    0.015
    """

    fixed_seconds: float = 0.005
    prefill_seconds: float = 0.0005  # a token
    decode_seconds: float = 0.0005  # a token
    attended_seconds: float = 0.0  # a key that a decode reads
    draft_seconds: float = 0.0005  # a token that is verified
    prefill_attended_seconds: float = 0.0  # a key that a row of a prompt reads
    prefill_fixed_seconds: float = (
        0.0  # of any prompt in a step: other kernels, tiles of rows that are not full
    )

    def seconds(self, work: StepWork) -> float:
        return (
            self.fixed_seconds
            + self.prefill_seconds * work.prefill_tokens
            + self.decode_seconds * work.decode_tokens
            + self.attended_seconds * work.attended_tokens
            + self.draft_seconds * work.draft_tokens
            + self.prefill_attended_seconds * work.prefill_attended_tokens
            + (self.prefill_fixed_seconds if work.prefill_tokens else 0.0)
        )

    def prefill_seconds_of(self, num_tokens: int, first_position: int = 0) -> float:
        """Of a prompt's rows beside other work; what a step costs anyway is left out."""
        attended = num_tokens * first_position + num_tokens * (num_tokens + 1) // 2
        return self.prefill_seconds * num_tokens + self.prefill_attended_seconds * attended


class OnlineStepCost:
    """A StepCost fitted to the steps that ran: least squares that forget, no coefficient below zero.

    As long as few drafts were verified lately, one costs what a prompt's token does.

    >>> cost = OnlineStepCost(StepCost())
    >>> for n in range(1, 200):
    ...     cost.observe(StepWork(decode_tokens=n % 9), 0.02 + 0.003 * (n % 9))
    >>> round(cost.model.fixed_seconds, 3), round(cost.model.decode_seconds, 4)
    (0.02, 0.003)
    """

    def __init__(self, initial: StepCost) -> None:
        self.model = initial
        weights = np.array(
            [
                initial.fixed_seconds,
                initial.prefill_seconds,
                initial.decode_seconds,
                initial.attended_seconds,
                initial.prefill_attended_seconds,
                initial.prefill_fixed_seconds,
            ]
        )
        self._gram: Float64Array = np.diag([*[_PRIOR_STEPS] * len(weights), 0.0])
        self._moment: Float64Array = self._gram @ (np.append(weights, 0.0) * _SCALE)
        self._num_observed = 0
        self._num_decodes_observed = 0
        self._mean_decodes = 1.0  # of the steps that have some

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learn from a step that ran."""
        seconds = self.plausible_seconds(work, seconds)
        if work.decode_tokens:
            self._num_decodes_observed += 1
            weight = max(_DECODES_MEMORY, 1.0 / self._num_decodes_observed)
            self._mean_decodes += weight * (work.decode_tokens - self._mean_decodes)
        features = (
            1.0,
            work.prefill_tokens,
            work.decode_tokens,
            work.attended_tokens,
            work.prefill_attended_tokens,
            work.prefill_tokens > 0,
            work.draft_tokens,
        )
        x = np.array(features) / _SCALE
        self._gram *= _FORGETTING
        self._moment *= _FORGETTING
        self._gram += np.outer(x, x)
        self._moment += x * seconds
        self._num_observed += 1
        if self._num_observed % _REFIT_STEPS == 0 or self._num_observed < _REFIT_STEPS:
            self._refit()

    def plausible_seconds(self, work: StepWork, seconds: float) -> float:
        """How long such a step took, less what the machine, or its clock, was somewhere else."""
        return min(seconds, _OUTLIER * self.model.seconds(work)) if self.is_fitted else seconds

    @property
    def is_fitted(self) -> bool:
        """Whether it has seen enough steps to say something of this machine."""
        return self._num_observed >= _REFIT_STEPS

    def seconds(self, work: StepWork) -> float:
        return self.model.seconds(work)

    def prefill_seconds_of(self, num_tokens: int, first_position: int = 0) -> float:
        return self.model.prefill_seconds_of(num_tokens, first_position)

    def share_seconds(self, step_seconds: float) -> float:
        """Of steps that took so long, the share of one sequence, among as many as usual."""
        return step_seconds / max(self._mean_decodes, 1.0)

    @property
    def decode_step_seconds(self) -> float:
        """Of a step without prompts, of as many decodes as usual; keys that they read are left out."""
        return self.model.fixed_seconds + self.model.decode_seconds * max(self._mean_decodes, 1.0)

    def decode_share_seconds(self, context_length: int) -> float:
        """Of a decode's row, and its share of what a step costs anyway, among as many as usual."""
        model = self.model
        shared = model.fixed_seconds / max(self._mean_decodes, 1.0)
        return model.decode_seconds + model.attended_seconds * context_length + shared

    def _refit(self) -> None:
        num = len(_SCALE) if self._gram[-1, -1] > _LEAST_DRAFTS else len(_SCALE) - 1
        solution = _solve_non_negative(self._gram[:num, :num], self._moment[:num]) / _SCALE[:num]
        fixed, prefill, decode, attended, prefill_attended, prefill_fixed, *draft = solution.tolist()
        self.model = StepCost(
            fixed_seconds=fixed,
            prefill_seconds=prefill,
            decode_seconds=decode,
            attended_seconds=attended,
            prefill_attended_seconds=prefill_attended,
            prefill_fixed_seconds=prefill_fixed,
            draft_seconds=draft[0] if draft else prefill,
        )


def _solve_non_negative(gram: Float64Array, moment: Float64Array) -> Float64Array:
    """Least squares without negative weights, by the normal equations (Lawson and Hanson, "Solving Least
    Squares Problems", 1974, chapter 23): features come in one by one, and go where their weight would be
    negative beside those that have come."""
    gram = gram + _RIDGE * np.eye(len(moment))
    weights = np.zeros(len(moment))
    is_in = np.zeros(len(moment), np.bool_)
    for _ in range(_MOST_ROUNDS * len(moment)):
        gradient = np.where(is_in, -np.inf, moment - gram @ weights)
        best = int(gradient.argmax())
        if gradient[best] <= _LEAST_GRADIENT * abs(float(moment[best])):
            break
        is_in[best] = True
        while True:
            solution = np.zeros(len(moment))
            solution[is_in] = np.linalg.solve(gram[np.ix_(is_in, is_in)], moment[is_in])
            goes = is_in & (solution <= 0)
            if not goes.any():
                break
            share = float((weights[goes] / (weights[goes] - solution[goes])).min())
            weights += share * (solution - weights)
            is_in &= weights > 0
        weights = solution
    return weights
