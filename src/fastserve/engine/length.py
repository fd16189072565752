"""How long completions are: distributions learned as they end, by the kind of request."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from itertools import takewhile
from statistics import NormalDist

import numpy as np

from fastserve.types import Float64Array

_MARK_GROWTH = 1.35  # of the ages at which a sequence is judged anew
_LAST_MARK = 10_000_000
_WINDOW = 1024  # of the newest completions that count
_MOST_KINDS = 1024  # those of which none has ended for longest are forgotten
_NUM_TRUSTED = 32  # completions of a kind that speak for themselves; below, a wider kind's are added
_NUM_PRIOR = 64  # quantiles that stand for completions as long as few are known
_PRIOR_MEDIAN, _PRIOR_SIGMA = 128.0, 1.2  # log-normal, as chats are
_LEAST_REST = 8  # longer ones than the age; fewer say nothing of the tail
_REFRESH_SHARE = 1 / 8  # of a window that is new when its distribution is made again
_QUANTILE_STEPS = 100  # quantiles are asked to a hundredth
_PRICE_STEP = 1.05  # prices within such a factor count as equal


def _make_marks() -> list[int]:
    marks = [0]
    while marks[-1] < _LAST_MARK:
        marks.append(max(marks[-1] + 1, int(marks[-1] * _MARK_GROWTH)))
    return marks


_MARKS = _make_marks()


def next_mark(num_tokens: int) -> int:
    """The age, in tokens, at which what is expected of a completion is to be asked again.

    >>> next_mark(0), next_mark(100)
    (1, 126)
    """
    return _MARKS[bisect_right(_MARKS, num_tokens)]


class LengthDistribution:
    """Of some completions; what is asked holds for one that has come to an age, in tokens.

    Ages count from the mark before them, and prices as the nearest power of 1.05, so that answers can be
    kept. A tail that few completions have reached is as long again as the age (heavy, as lengths are).
    """

    def __init__(self, lengths: Float64Array) -> None:
        self._sorted = np.sort(lengths)
        self._answers: dict[tuple[str, int, int], float] = {}
        self._rests: dict[int, Float64Array] = {}

    def mean_left(self, age: int) -> float:
        """Tokens to the end, on average."""
        return self._answer("mean", age, 0, lambda rest, _: float(rest.mean()))

    def quantile_left(self, age: int, quantile: float) -> float:
        """Tokens to the end that such a share of completions does not exceed."""
        index = round(_QUANTILE_STEPS * quantile)
        return self._answer(
            "quantile", age, index, lambda rest, _: float(np.quantile(rest, index / _QUANTILE_STEPS))
        )

    def log_moment(self, age: int, price: float) -> float:
        """ln E[exp(price * tokens left)]."""

        def moment(rest: Float64Array, price: float) -> float:
            exponents = price * rest
            most = float(exponents.max())
            return most + math.log(float(np.exp(exponents - most).mean()))

        return self._answer("moment", age, _price_index(price), moment)

    def least_ratio(self, age: int, first_cost: float, price: float) -> float:
        """The least, over all numbers of tokens n, of the expected cost of going on to the end, but for n
        tokens at most, over the chance that the end comes within them: the inverse of the Gittins index.

        Args:
            first_cost: of getting to the first of the tokens.
            price: of a token.
        """

        def ratio(rest: Float64Array, price: float) -> float:
            n = len(rest)
            within = np.arange(1, n + 1) / n
            tokens = (np.cumsum(rest) + rest * np.arange(n - 1, -1, -1)) / n  # E[min(left, rest[i])]
            return float(((first_cost + price * tokens) / within).min())

        if first_cost:
            return ratio(self._rest(_mark_index(age)), price)
        return self._answer("ratio", age, _price_index(price), ratio)

    def _answer(
        self, name: str, age: int, price_index: int, ask: Callable[[Float64Array, float], float]
    ) -> float:
        key = (name, _mark_index(age), price_index)
        if key not in self._answers:
            self._answers[key] = ask(self._rest(key[1]), _PRICE_STEP**price_index)
        return self._answers[key]

    def _rest(self, mark_index: int) -> Float64Array:
        """Tokens left of those that are longer than a mark, in order."""
        if mark_index not in self._rests:
            mark = _MARKS[mark_index]
            rest = self._sorted[np.searchsorted(self._sorted, mark, "right") :] - mark
            if len(rest) < _LEAST_REST:
                rest = np.sort(np.concatenate([rest, max(mark, 16) * np.array([0.25, 0.5, 1.0, 2.0])]))
            self._rests[mark_index] = rest
        return self._rests[mark_index]


Kind = tuple[str, ...]
"""Of a request, from the widest name to the narrowest: its tenant, the endpoint, a predictor's class. It lies
in all kinds whose names its own begins with."""


class OutputLengths:
    """Distributions by kind of request, of the newest completions.

    A kind of which little is known yet takes to its own those of the next wider kinds, up to one of which
    enough is known; the widest is all completions, and before these are known, too, a log-normal distribution
    around 128 tokens.

    >>> lengths = OutputLengths()
    >>> for _ in range(100):
    ...     lengths.observe(("alice", "chat"), 50)
    ...     lengths.observe(("bob",), 1000)
    >>> lengths.of(("alice", "summary")).mean_left(0)  # as alice's others
    50.0
    """

    def __init__(self) -> None:
        self._all = _Window()
        self._kinds: OrderedDict[Kind, _Window] = OrderedDict()  # the one that ended last at the end
        self._unknown = _Window()  # stands for all others
        self._prior = _PRIOR_MEDIAN * np.exp(_PRIOR_SIGMA * _normal_quantiles(_NUM_PRIOR))

    def __len__(self) -> int:
        """Kinds that are remembered."""
        return len(self._kinds)

    def observe(self, kind: Kind, num_tokens: int) -> None:
        """A completion has ended."""
        self._all.add(num_tokens)
        for name in _widening(kind):
            self._kinds.setdefault(name, _Window()).add(num_tokens)
            self._kinds.move_to_end(name)  # wider ones last: they are forgotten after those within
        while len(self._kinds) > _MOST_KINDS:
            self._kinds.popitem(last=False)

    @property
    def is_known(self) -> bool:
        """Whether enough have ended to speak for those of which nothing is known."""
        return len(self._all.lengths) >= _NUM_PRIOR

    def of(self, kind: Kind) -> LengthDistribution:
        """What is known of completions of a kind."""
        windows = [self._kinds[name] for name in _widening(kind) if name in self._kinds]
        return self._distribution(windows or [self._unknown])

    def of_all(self) -> LengthDistribution:
        """What is known of completions of all kinds."""
        return self._distribution([self._unknown])

    def _distribution(self, windows: list[_Window]) -> LengthDistribution:
        """Of the first of these, with as many of the wider ones, which follow it, as it takes."""
        window = windows[0]
        source = next((w for w in windows if w.is_trusted), self._all)
        num_known = source.num_ever
        is_stale = num_known - window.num_when_made > _REFRESH_SHARE * min(num_known, _WINDOW)
        if window.distribution is None or source is not window.source or is_stale:
            parts = [w.to_array() for w in (*takewhile(lambda w: w is not source, windows), source)]
            if source is self._all and not self.is_known:
                parts.append(self._prior)
            window.distribution = LengthDistribution(np.concatenate(parts))
            window.num_when_made = num_known
            window.source = source
        return window.distribution


def _widening(kind: Kind) -> Iterator[Kind]:
    """A kind and those that it lies in, the widest last."""
    return (kind[:length] for length in range(len(kind), 0, -1))


class _Window:
    """The newest completions of a kind, and what was made of them."""

    def __init__(self) -> None:
        self.lengths: deque[int] = deque(maxlen=_WINDOW)
        self.num_ever = 0
        self.distribution: LengthDistribution | None = None
        self.num_when_made = 0  # of the source's
        self.source: _Window | None = None  # the widest that the distribution was made of

    @property
    def is_trusted(self) -> bool:
        """Whether it speaks for itself."""
        return len(self.lengths) >= _NUM_TRUSTED

    def add(self, num_tokens: int) -> None:
        self.lengths.append(num_tokens)
        self.num_ever += 1

    def to_array(self) -> Float64Array:
        return np.array(self.lengths, np.float64)


def _mark_index(age: int) -> int:
    return bisect_right(_MARKS, age) - 1


def _price_index(price: float) -> int:
    return round(math.log(max(price, 1e-12)) / math.log(_PRICE_STEP))


def _normal_quantiles(n: int) -> Float64Array:
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / n) for i in range(n)])
