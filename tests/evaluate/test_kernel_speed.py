from __future__ import annotations

import pytest

pytest.importorskip("fastserve._native")

from evaluate_machine import make_limits

from fastserve.errors import MeasurementError, OptionError
from fastserve.evaluate import kernel_speed
from fastserve.evaluate.kernel_speed import linear_shapes, make_batch, measure_linears, measure_ops
from fastserve.evaluate.machine import MIB, MachineLimits

ENDLESS = make_limits(
    threads=1, read_bytes_per_second=1e15, int8_operations_per_second=1e18, f32_operations_per_second=1e18
)


@pytest.fixture(autouse=True)
def small_working_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_speed, "WORKING_SET", MIB)


def stub_limits(monkeypatch: pytest.MonkeyPatch, limits: MachineLimits) -> None:
    monkeypatch.setattr(kernel_speed, "measure_limits", lambda threads, **options: limits)


def test_the_linears_of_a_shape_are_those_that_run_merged() -> None:
    # q, k and v in one, and gate and up.
    assert linear_shapes("smollm2-135m") == [(960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)]


def test_every_format_and_number_of_rows_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_limits(monkeypatch, ENDLESS)
    _, speeds = measure_linears([(64, 128)], ["f32", "int8", "int4:g32"], rows=(1, 5), threads=1, repeats=1)
    assert [(s.weights, s.rows) for s in speeds] == [
        (weights, rows) for weights in ("f32", "int8", "int4:g32") for rows in (1, 5)
    ]
    for speed in speeds:
        assert (speed.op, speed.shape) == ("linear", "64x128")
        assert speed.operations_per_second * speed.seconds == pytest.approx(2 * 64 * 128 * speed.rows)
    f32 = speeds[0]
    assert f32.bytes_per_second * f32.seconds == pytest.approx(4 * 64 * 128, rel=0.1)
    assert f32.share_of_read == pytest.approx(f32.bytes_per_second / 1e15)


def test_a_kernel_beyond_the_limit_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_limits(monkeypatch, make_limits(threads=1))
    with pytest.raises(MeasurementError, match="linear 64x128 int8 of 1 rows"):
        measure_linears([(64, 128)], ["int8"], rows=(1,), threads=1, repeats=1)


def test_the_other_ops_are_measured_for_a_prompt_and_for_one_row() -> None:
    speeds = measure_ops("smollm2-135m", ENDLESS, context_length=64, num_rows=40, repeats=1)
    assert {speed.rows for speed in speeds if speed.op == "attention"} == {1, 40}
    assert {"attention", "store_kv"} <= {speed.op for speed in speeds}
    assert not {"linear", "sample"} & {speed.op for speed in speeds}


def test_a_batch_ends_where_its_context_does() -> None:
    batch = make_batch(2, 40)
    assert batch.positions.tolist() == [38, 39]
    assert batch.block_tables.tolist() == [[0, 1]]


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(OptionError, match="gpt-5"):
        linear_shapes("gpt-5")
