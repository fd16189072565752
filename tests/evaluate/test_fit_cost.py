from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from fastserve.config import EngineOptions
from fastserve.engine.load import load_model
from fastserve.errors import MeasurementError
from fastserve.evaluate.fit_cost import features_of, fit_cost, fit_machine, to_json
from fastserve.evaluate.simulated_machine import parse_machine
from fastserve.types import Batch

TRUE = np.array([0.01, 4e-4, 1e-3, 1e-8, 2e-7])


def steps(num_steps: int, *, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    prefill, decode = rng.integers(0, 400, num_steps), rng.integers(0, 64, num_steps)
    features = np.stack(
        [
            np.ones(num_steps),
            prefill,
            decode,
            prefill * rng.integers(1, 2000, num_steps),
            decode * rng.integers(1, 2000, num_steps),
        ],
        axis=1,
    ).astype(np.float64)
    return features, features @ TRUE * (1 + noise * rng.exponential(1, num_steps))


def test_the_coefficients_of_exact_steps_are_found() -> None:
    cost, kept = fit_cost(*steps(200))
    assert list(asdict(cost).values()) == pytest.approx([*TRUE[:3], 0.0, *TRUE[3:]])
    assert kept.all()


def test_steps_that_others_disturbed_are_left_out() -> None:
    features, seconds = steps(200)
    seconds[::10] *= 30
    cost, kept = fit_cost(features, seconds)
    assert cost.fixed_seconds == pytest.approx(0.01)
    assert not kept[::10].any()


def test_leaning_to_fast_steps_finds_the_undisturbed_cost() -> None:
    features, seconds = steps(2000, noise=0.3)
    mean, _ = fit_cost(features, seconds)
    undisturbed, _ = fit_cost(features, seconds, slow_weight=0.02)
    assert mean.decode_seconds > 1.1 * TRUE[2]
    assert undisturbed.decode_seconds == pytest.approx(TRUE[2], rel=0.1)


def test_no_coefficient_is_negative() -> None:
    features, seconds = steps(200)
    cost, _ = fit_cost(features, np.full_like(seconds, 0.01))
    assert min(asdict(cost).values()) >= 0
    assert cost.fixed_seconds == pytest.approx(0.01)


def test_few_steps_are_refused() -> None:
    with pytest.raises(MeasurementError, match="5 steps are too few"):
        fit_cost(*steps(5))


def test_a_batch_is_prompts_and_decodes_with_the_keys_they_read() -> None:
    """A prompt's rows 3 to 5 read 4 + 5 + 6 keys, the decodes 8 and 2, the first token of a prompt 1."""
    int32 = np.int32
    batch = Batch(
        token_ids=np.zeros(6, int32),
        positions=np.array([3, 4, 5, 7, 1, 0], int32),
        sequence_starts=np.array([0, 3, 4, 5, 6], int32),
        context_lengths=np.array([6, 8, 2, 1], int32),
        block_tables=np.zeros((4, 1), int32),
        output_rows=np.zeros(0, int32),
    )
    assert features_of(batch) == (1, 4, 2, 16, 10)


def test_a_real_model_becomes_a_machine(shared_data: Path) -> None:
    options = EngineOptions(threads=1, kv_memory="16MiB")
    model = load_model(shared_data / "model_stories260K", options)
    machine, fit = fit_machine(model, options, name="stories")
    assert fit.num_steps > 100
    assert fit.swap_bytes_per_second > 1e6
    assert machine.cost.fixed_seconds > 0
    assert parse_machine(to_json(machine, fit)) == machine
