"""What Prometheus reads of models: which are loaded, in how much memory, and how often they come and go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fastserve.serve.model_entry import ModelEntry, ModelState
from fastserve.serve.model_table import ModelTable

# Name, what it counts, and the value of a model.
_GAUGES: Seq[tuple[str, str, Callable[[ModelEntry], float]]] = (
    (
        "model_memory_bytes",
        "Memory of a model that is loaded, or on its way in or out.",
        lambda e: 0 if e.state == "unloaded" else e.num_bytes,
    ),
    ("model_requests", "Requests that use a model.", lambda e: e.num_requests),
    ("model_waiting_requests", "Requests that wait for a model to be loaded.", lambda e: len(e.waiting)),
)
_COUNTERS: Seq[tuple[str, str, Callable[[ModelEntry], float]]] = (
    ("model_loads", "How often a model was loaded.", lambda e: e.num_loads),
    ("model_load_failures", "Loads of a model that have failed.", lambda e: e.num_failed_loads),
    ("model_load_seconds", "Time that loads of a model have taken.", lambda e: e.load_seconds),
    ("model_unloads", "How often a model's memory was given back.", lambda e: e.num_unloads),
)


class ModelMetrics(Collector):
    """Of one server."""

    def __init__(self, models: ModelTable) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        entries = self._models.entries
        counts = Counter(entry.state for entry in entries)
        states = GaugeMetricFamily("fastserve_models", "Models, by their state.", labels=["state"])
        for state in get_args(ModelState):
            states.add_metric([state], counts[state])
        yield states
        budget_bytes = self._models.memory.budget_bytes
        if budget_bytes is not None:
            text = "Most memory of all models together."
            yield GaugeMetricFamily("fastserve_model_memory_budget_bytes", text, value=budget_bytes)
        for family_of, rows in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, text, read in rows:
                family = family_of(f"fastserve_{name}", text, labels=["model"])
                for entry in entries:
                    family.add_metric([entry.name], read(entry))
                yield family
