from __future__ import annotations

import numpy as np
import pytest

from fastserve.backends.relative_bias import bucket_of_distances
from fastserve.graph.node import Parameter, RelativeBias


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (32, 64), (8, 20), (16, 1000)])
def test_buckets_are_those_of_transformers(bidirectional: bool, num_buckets: int, max_distance: int) -> None:
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    bias = RelativeBias(Parameter(("bias",), (num_buckets, 1)), max_distance, bidirectional)
    distances = np.arange(-2000, 2001)
    expected = t5.T5Attention._relative_position_bucket(
        torch.from_numpy(distances), bidirectional, num_buckets, max_distance
    )
    np.testing.assert_array_equal(bucket_of_distances(bias, distances), expected.numpy())


def test_the_buckets_of_mpnet_are_the_same() -> None:
    torch = pytest.importorskip("torch")
    mpnet = pytest.importorskip("transformers.models.mpnet.modeling_mpnet")
    bias = RelativeBias(Parameter(("bias",), (32, 1)), max_distance=128, bidirectional=True)
    distances = np.arange(-600, 601)
    expected = mpnet.MPNetEncoder.relative_position_bucket(torch.from_numpy(distances), num_buckets=32)
    np.testing.assert_array_equal(bucket_of_distances(bias, distances), expected.numpy())
