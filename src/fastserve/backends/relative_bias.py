"""The buckets that relative position bias shares distances by, the same for every backend."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fastserve.graph.node import RelativeBias


def bucket_of_distances(bias: RelativeBias, distances: NDArray[np.int64]) -> NDArray[np.int64]:
    """The bucket of every distance, which is the key's position less the query's.

    In float32 where there are logarithms, as T5's own code has it (arXiv 1910.10683; `relative_attention.py`
    of Mesh TensorFlow): another precision would move distances at a bucket's edge into the next.

    >>> from fastserve.graph.node import Parameter
    >>> bias = RelativeBias(Parameter(("bias",), (8, 1)), max_distance=16, bidirectional=True)
    >>> bucket_of_distances(bias, np.array([-100, -2, -1, 0, 1, 2, 100])).tolist()
    [3, 2, 1, 0, 5, 6, 7]
    """
    num_buckets = bias.num_buckets // 2 if bias.bidirectional else bias.num_buckets
    num_exact = num_buckets // 2
    away = np.abs(distances) if bias.bidirectional else np.maximum(-distances, 0)
    ratios = np.log(np.maximum(away, num_exact).astype(np.float32) / np.float32(num_exact))
    shares = ratios / np.float32(math.log(bias.max_distance / num_exact))
    shared = num_exact + (shares * np.float32(num_buckets - num_exact)).astype(np.int64)
    buckets = np.where(away < num_exact, away, np.minimum(shared, num_buckets - 1))
    return buckets + num_buckets * (distances > 0) if bias.bidirectional else buckets
