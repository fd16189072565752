from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from fastserve.errors import OptionError, TraceError
from fastserve.evaluate.schedule_comparison import compare
from fastserve.evaluate.schedule_plot import PLOTS, plot_runs
from fastserve.evaluate.schedule_sweep import Run, Sweep, run_sweep
from fastserve.evaluate.simulated_machine import load_machine

LATENCIES = ("ttft_seconds", "e2e_seconds", "normalized_seconds", "gap_seconds")


def make_run(policy: str, seed: int, factor: float, *, load: float = 0.8) -> Run:
    values = np.random.default_rng(seed).exponential(1.0, 2000) * factor
    figures = {figure: float(values.mean()) for figure, _ in PLOTS.values()}
    return Run(policy, load, seed, figures, dict.fromkeys(LATENCIES, values))


def test_a_policy_that_halves_every_latency_has_a_ratio_of_a_half_without_doubt() -> None:
    runs = [make_run(policy, seed, factor) for policy, factor in (("a", 2.0), ("b", 1.0)) for seed in (0, 1)]
    (comparison,) = compare(runs)
    assert (comparison.policy, comparison.load) == ("b", 0.8)
    for ratio in comparison.ratios.values():
        assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.5, 0.5, 0.5))


def test_a_difference_by_chance_has_one_within_its_interval() -> None:
    runs = [make_run("a", 0, 1.0), Run("b", 0.8, 0, {}, make_run("b", 7, 1.0).by_request)]
    (comparison,) = compare(runs)
    ratio = comparison.ratios["e2e_mean"]
    assert ratio.low < 1.0 < ratio.high
    assert ratio.high - ratio.low == pytest.approx(4 * 2**0.5 / 2000**0.5, rel=0.4)


def test_every_load_is_compared_by_itself() -> None:
    runs = [
        make_run(p, 0, factor, load=load)
        for p, factor, load in (("a", 1, 0.5), ("a", 1, 1.0), ("b", 3, 0.5), ("b", 1, 1.0))
    ]
    ratios = {c.load: c.ratios["ttft_p99"].value for c in compare(runs)}
    assert ratios == pytest.approx({0.5: 3.0, 1.0: 1.0})


def test_a_sweep_in_two_processes_is_that_in_one() -> None:
    sweep = Sweep(
        traffic="short-chat",
        machine=load_machine("a100"),
        policies=("fcfs", "sjf"),
        loads=(0.9,),
        num_requests=64,
    )
    one, two = (run_sweep(sweep, processes=processes) for processes in (1, 2))
    assert [run.to_json() for run in one] == [run.to_json() for run in two]
    assert [run.policy for run in one] == ["fcfs", "sjf"]


def test_a_sweep_of_an_unknown_policy_is_refused_before_anything_runs() -> None:
    with pytest.raises(OptionError, match="policy 'lifo' is unknown"):
        Sweep(traffic="short-chat", machine=load_machine("cpu"), policies=("fcfs", "lifo"))
    with pytest.raises(OptionError, match="load=0"):
        Sweep(traffic="short-chat", machine=load_machine("cpu"), policies=("fcfs",), loads=(0.0,))
    with pytest.raises(TraceError, match="no trace is at nope"):
        run_sweep(Sweep(traffic="nope", machine=load_machine("cpu"), policies=("fcfs",)))


def test_charts_are_svg_with_a_line_for_every_policy(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [make_run(p, 0, 1.0, load=load) for p in ("fcfs", "mlfq") for load in (0.5, 1.0)]
    files = plot_runs(runs, tmp_path / "charts", title="short-chat on cpu")
    assert {file.stem for file in files} == set(PLOTS)
    for file in files:
        text = "".join(ElementTree.parse(file).getroot().itertext())
        assert "fcfs" in text
        assert "mlfq" in text
