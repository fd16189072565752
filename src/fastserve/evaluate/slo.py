"""A service level objective of a run: bounds of its figures, and when it has missed one for sure."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from fastserve.errors import OptionError
from fastserve.evaluate.exchange import Exchange, PlannedRequest
from fastserve.evaluate.latency import counted_of
from fastserve.evaluate.load_run import GIVEN_UP
from fastserve.option import check_number

_LATENCIES = ("ttft", "tpot", "itl", "gap", "e2e", "normalized")
_STATISTICS = ("mean", "p50", "p95", "p99", "max")
_GOOD_SHARE = "good_share"


@dataclass(frozen=True, slots=True)
class Slo:
    """Bounds of figures by name: seconds at most of a latency, a share at least of good requests.

    It is held only where every request is answered whole: one that is refused or lost misses it.
    """

    bounds: Mapping[str, float]

    @classmethod
    def parse(cls, text: str) -> Slo:
        """
        >>> Slo.parse("ttft_p99=5,normalized_mean=0.15").bounds
        {'ttft_p99': 5.0, 'normalized_mean': 0.15}

        Raises:
            OptionError: a figure is unknown, or its bound no number above 0.
        """
        bounds = {}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            latency, _, statistic = name.rpartition("_")
            if name != _GOOD_SHARE and not (latency in _LATENCIES and statistic in _STATISTICS):
                raise OptionError(
                    f"slo={part.strip()!r} bounds no figure",
                    hint=f"write one of {', '.join(_LATENCIES)} and one of {', '.join(_STATISTICS)}, as in "
                    f"ttft_p99=5,normalized_mean=0.15; or {_GOOD_SHARE}=0.9",
                )
            try:
                bounds[name] = float(value)
            except ValueError:
                raise OptionError(
                    f"slo={part.strip()!r} has no number", hint="write one as in ttft_p99=5"
                ) from None
            check_number(f"slo {name}", bounds[name], 0.0, 1e6, is_low_open=True)
        return cls(bounds)

    def is_held(self, figures: Mapping[str, float]) -> bool:
        """Whether a run with these figures (`load_figures.summarize_load`) holds it."""
        return not figures["num_failed"] and all(
            figures[name] >= bound if name == _GOOD_SHARE else figures[f"{name}_seconds"] <= bound
            for name, bound in self.bounds.items()
        )

    def is_lost(self, exchanges: Seq[Exchange], planned: Seq[PlannedRequest], now: float) -> bool:
        """Whether a run can no longer hold it, whatever comes: some request failed, or a bound is missed even
        if all that has not happened yet happened now, and what is yet to be sent took no time at all."""
        if any(e.failure is not None and e.failure != GIVEN_UP for e in exchanges):
            return True
        least: dict[str, list[float]] = {"ttft": [], "e2e": [], "normalized": []}
        for exchange in exchanges:
            first = exchange.first_token_seconds or now
            seconds = (exchange.end_seconds or now) - exchange.arrival_seconds
            least["ttft"].append(first - exchange.arrival_seconds)
            least["e2e"].append(seconds)
            least["normalized"].append(seconds / exchange.planned.arrival.completion_tokens)
        for name, bound in self.bounds.items():
            latency, _, statistic = name.rpartition("_")
            if latency not in least:
                continue
            values = np.zeros(len(planned))
            values[: len(exchanges)] = least[latency]
            if _statistic(values[counted_of(len(planned))], statistic) > bound:
                return True
        return False


def _statistic(values: np.ndarray, name: str) -> float:
    if name == "mean":
        return float(values.mean())
    return float(values.max() if name == "max" else np.percentile(values, int(name[1:])))
