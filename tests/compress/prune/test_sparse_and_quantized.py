"""Pruned, then quantized: zeros are codes of zero, which the sidecar leaves out and the runtime skips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.working_models import all_values, make_context, random_sequences, working_model
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.compress.prune.magnitude import Magnitude
from fastserve.compress.prune.sparsegpt import SparseGpt
from fastserve.compress.quantize.step import Rtn
from fastserve.compress.step import Targets
from tiny_models import BERT_CONFIG, LLAMA_CONFIG

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
LLAMA: dict[str, Any] = {**LLAMA_CONFIG, **WIDE, "head_dim": 16}


@pytest.mark.parametrize(
    ("prune", "bits"),
    [
        (Magnitude(sparsity=0.6), 8),
        (Magnitude(pattern="2:4"), 4),
        (SparseGpt(sparsity=0.6), 8),
        (SparseGpt(sparsity=0.5, pattern="1x4"), 4),
    ],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_was_pruned_has_the_code_of_zero(tmp_path: Path, prune: Any, bits: int, symmetric: bool) -> None:
    config = LLAMA if bits == 4 else {**BERT_CONFIG, **WIDE}
    model = working_model(config)
    context = make_context(tmp_path, calibration=random_sequences(97, 4, 40))
    pruned = prune.run(model, context)
    quantized = Rtn(bits=bits, symmetric=symmetric).run(pruned, context)
    values = all_values(pruned)
    names = pruned.matrices(Targets())
    for name in names:
        tensor = quantized.tensors[name]
        assert isinstance(tensor, GroupedTensor)
        codes, zeros, _ = tensor.groups(0, tensor.shape[0])
        zero = 0 if zeros is None else zeros[:, np.arange(tensor.shape[1]) // tensor.group_size]
        gone = values[name] == 0
        assert gone.mean() == pytest.approx(prune.sparsity or 0.5, abs=0.02)
        assert (codes == zero)[gone].all()
        assert (codes != zero)[~gone].mean() > 0.8
