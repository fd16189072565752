"""Models in our sidecar, run by the native backend."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fastserve.backends.native import storage_choice
from fastserve.backends.native.weight_scheme import Storage
from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.conversion import Matrices
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.convert_checkpoint import convert
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.config import WeightsChoice
from fastserve.engine.llm import LLM
from fastserve.evaluate.random_model import SHAPES, write_random_model
from fastserve.models.matrices import find_matrices
from fastserve.types import SamplingParams
from packed_model import pack_model, pruned

TINY = {**SHAPES["smollm2-135m"], "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
TINY |= {"head_dim": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 320}
PROMPT = [1, 17, 40, 250, 3]


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """The shares of zeros that were measured, with made-up speeds by which a bitmask wins from 40 % on; in an
    empty store."""
    shares: list[float] = []

    def measure(
        runtime: object, scheme: object, zeros: float, rows: Sequence[int], *, storages: Sequence[Storage]
    ) -> dict[Storage, dict[int, float]]:
        shares.append(zeros)
        speeds = {"bitmask": 0.7 + zeros, "csr": 0.5}
        return {name: dict.fromkeys(rows, speeds[name]) for name in storages}

    monkeypatch.setattr(storage_choice, "measure_speeds", measure)
    monkeypatch.setenv("FASTSERVE_HOME", str(tmp_path / "store"))
    return shares


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "source"
    write_random_model(TINY, folder)
    return folder


def packed(source: Path, output: Path, bits: int, group_size: int, share_of_zeros: float) -> Path:
    matrices = find_matrices(open_checkpoint(source))

    def make(tensor: StoredTensor) -> GroupedTensor | None:
        if tensor.name not in matrices.linears:
            return None
        return pruned(
            tensor,
            share_of_zeros=share_of_zeros,
            bits=bits,
            group_size=group_size,
            scale_format=TensorFormat.BF16,
        )

    pack_model(source, output, make)
    return output


def tokens(folder: Path, weights: WeightsChoice = "auto") -> list[int]:
    with LLM(folder, weights=weights, kv_dtype="f32", context_length=64) as llm:
        (completion,) = llm.generate(PROMPT, SamplingParams(max_tokens=24, ignore_eos=True))
    return list(completion.token_ids)


@pytest.mark.parametrize("share_of_zeros", [0.0, 0.5, 0.95])
@pytest.mark.parametrize(("bits", "group_size"), [(8, 0), (8, 64), (4, 64), (3, 32), (2, 64)])
def test_greedy_tokens_are_those_of_the_dense_export(
    source: Path, tmp_path: Path, bits: int, group_size: int, share_of_zeros: float
) -> None:
    folder = packed(source, tmp_path / "packed", bits, group_size, share_of_zeros)
    convert(open_checkpoint(folder), "safetensors", "f32", tmp_path / "dense", Matrices())
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert tokens(folder, "f32") == tokens(tmp_path / "dense", "f32")
    if (bits, group_size) == (8, 0):  # rounding the export gives the same whole numbers again
        assert tokens(folder) == tokens(tmp_path / "dense", "int8")


@pytest.mark.parametrize(("bits", "group_size"), [(8, 0), (4, 64), (3, 64)])
def test_compressed_tensors_hold_the_same_numbers_where_the_format_fits(
    source: Path, tmp_path: Path, bits: int, group_size: int
) -> None:
    folder = packed(source, tmp_path / "packed", bits, group_size, 0.5)
    checkpoint = open_checkpoint(folder)
    done = convert(checkpoint, "compressed-tensors", "auto", tmp_path / "other", find_matrices(checkpoint))
    assert any(line.startswith("14 tensors kept exactly as int") for line in done.lines)
    other = open_checkpoint(tmp_path / "other")
    for name, tensor in checkpoint.tensors.items():
        assert np.array_equal(to_f32(tensor), to_f32(other.tensors[name]))
    assert tokens(folder) == tokens(tmp_path / "other")


def test_sparse_kernels_are_chosen_by_measurement(
    source: Path,
    tmp_path: Path,
    measured: list[float],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`--weights auto` runs a packed matrix as what was measured fastest for its share of zeros; the tokens
    are those of dense weights."""
    for bits, group_size in [(8, 0), (4, 64), (3, 64)]:
        folder = packed(source, tmp_path / f"packed{bits}", bits, group_size, 0.5)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            sparse = tokens(folder)
        assert "matrices by storage: 8 bitmask, 1 dense" in caplog.text
        with monkeypatch.context() as patched:
            patched.setattr(storage_choice.StorageChoice, "choose", lambda *arguments: "dense")
            assert tokens(folder) == sparse
    assert measured == [*storage_choice.ZEROS, *storage_choice.ZEROS], "3 bits run as 4"


ENCODER = {**SHAPES["minilm"], "hidden_size": 128, "num_attention_heads": 2}
ENCODER |= {"intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 320}


def test_an_encoder_runs_as_it_is_packed(tmp_path: Path) -> None:
    """`--weights auto` is float32 for encoders, but what was compressed to int8 is run as int8."""
    write_random_model(ENCODER, tmp_path / "source")
    folder = packed(tmp_path / "source", tmp_path / "packed", 8, 0, 0.6)
    with LLM(folder) as llm:
        assert llm.model.weights == "stored"
        packed_vector = np.array(llm.embed(["a text"])[0])
    with LLM(folder, weights="f32") as llm:
        exact = np.array(llm.embed(["a text"])[0])
    assert 0 < np.abs(packed_vector - exact).max() < 0.05  # activations of int8
