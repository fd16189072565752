"""What is written of a working model: read again by us and by `transformers`, refused where it differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastserve._native")

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.checkpoint.rounding import round_to_groups
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.compress.artifact import check_artifact, settle, write_artifact
from fastserve.compress.step import Targets, WorkingModel
from fastserve.errors import CheckpointError, OptionError


@pytest.fixture
def stories(shared_data: Path) -> WorkingModel:
    return WorkingModel(checkpoint=open_checkpoint(shared_data / "model_stories260K"))


def rounded(model: WorkingModel, *, bits: int = 8, group_size: int = 0, **options: Any) -> WorkingModel:
    names = model.matrices(Targets())
    tensors = {
        name: round_to_groups(
            model.tensors[name], bits=bits, group_size=group_size, scale_format=TensorFormat.BF16
        )
        for name in names
    }
    if options.get("with_int8"):
        return model.with_tensors(tensors, int8_activations=frozenset(names))
    return model.with_tensors(tensors)


def pruned(model: WorkingModel, sparsity: float) -> WorkingModel:
    """Every matrix without the smallest of its elements."""
    tensors = {}
    for name in model.matrices(Targets()):
        values = to_f32(model.tensors[name])
        kept = np.where(np.abs(values) < np.quantile(np.abs(values), sparsity), np.float32(0), values)
        data = np.ascontiguousarray(kept).view(np.uint8).reshape(-1)
        tensors[name] = StoredTensor(name, TensorFormat.F32, values.shape, data)
    return model.with_tensors(tensors)


def logits_of_transformers(folder: Path, ids: list[int]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model, model(torch.tensor([ids])).logits[0].float().numpy()


@pytest.mark.parametrize(("bits", "with_int8"), [(8, False), (8, True), (4, False)])
def test_whole_numbers_are_read_again_bit_by_bit_and_by_transformers(
    stories: WorkingModel, tmp_path: Path, bits: int, with_int8: bool
) -> None:
    model = rounded(stories, bits=bits, with_int8=with_int8)
    sizes = write_artifact(model, tmp_path / "out", {"lineage": {"parent": "stories"}})
    assert sizes.form == "compressed-tensors"
    assert sizes.weight_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    matrix = sizes.tensors["model.layers.0.mlp.up_proj.weight"]
    assert matrix.stored == f"int{bits} in rows"
    rows, columns = model.tensors["model.layers.0.mlp.up_proj.weight"].shape
    assert 0 <= matrix.num_bytes - rows * columns * bits // 8 - 2 * rows <= 16 + 2 * rows
    check_artifact(model, tmp_path / "out")
    opened, logits = logits_of_transformers(tmp_path / "out", list(range(3, 40)))
    assert np.isfinite(logits).all()
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    if with_int8:
        (group,) = config["quantization_config"]["config_groups"].values()
        assert group["input_activations"]["dynamic"] is True
    else:
        state = opened.state_dict()
        for name in model.matrices(Targets()):
            if name in state:
                np.testing.assert_array_equal(state[name].float().numpy(), to_f32(model.tensors[name]))
    card = json.loads((tmp_path / "out" / "fastserve.json").read_text("utf-8"))
    assert card == {"schema_version": 1, "lineage": {"parent": "stories"}}


def test_the_config_is_what_the_schema_of_compressed_tensors_takes(
    stories: WorkingModel, tmp_path: Path
) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    write_artifact(rounded(stories, bits=4), tmp_path / "out", {})
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["quantization_config"]
    read = QuantizationConfig.model_validate(config)
    (group,) = read.config_groups.values()
    assert (group.weights.num_bits, group.weights.symmetric, group.weights.strategy) == (4, True, "channel")


@pytest.mark.parametrize(("bits", "sparsity"), [(3, 0.0), (8, 0.5), (4, 0.75)])
def test_what_transformers_cannot_hold_goes_to_the_sidecar(
    stories: WorkingModel, tmp_path: Path, bits: int, sparsity: float
) -> None:
    model = rounded(pruned(stories, sparsity), bits=bits)
    sizes = write_artifact(model, tmp_path / "out", {})
    assert sizes.form == "fastserve"
    check_artifact(model, tmp_path / "out")
    matrix = sizes.tensors["model.layers.0.mlp.up_proj.weight"]
    assert matrix.stored == f"int{bits} in rows"
    assert matrix.sparsity is not None
    assert sparsity <= matrix.sparsity < sparsity + 0.35
    dense = matrix.num_elements * bits / 8
    assert matrix.num_bytes < (dense + 256 * 2 if not sparsity else 0.75 * dense)
    assert sizes.expanded_bytes > sizes.weight_bytes
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert sizes.weight_bytes == sum(files.values())


def test_pruned_floats_stay_floats_with_their_zeros_counted(stories: WorkingModel, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    values = to_f32(stories.tensors[name]).copy()
    values[:, ::2] = 0
    tensor = StoredTensor(name, TensorFormat.F32, values.shape, values.view(np.uint8).reshape(-1))
    sizes = write_artifact(stories.with_tensors({name: tensor}), tmp_path / "out", {})
    assert sizes.form == "safetensors"
    assert sizes.tensors[name].sparsity == 0.5
    assert not (tmp_path / "out" / ".part").exists()
    read = open_checkpoint(tmp_path / "out")
    np.testing.assert_array_equal(to_f32(read.tensors[name]), values)


def test_blocks_of_gguf_become_bfloat16(shared_data: Path, tmp_path: Path) -> None:
    source = open_checkpoint(shared_data / "model_stories260K" / "stories260K.gguf")
    model = settle(WorkingModel(checkpoint=source))
    write_artifact(WorkingModel(checkpoint=source), tmp_path / "out", {})
    check_artifact(model, tmp_path / "out")


def test_an_artifact_that_differs_is_refused_by_name(stories: WorkingModel, tmp_path: Path) -> None:
    model = rounded(stories)
    write_artifact(model, tmp_path / "out", {})
    name = "model.layers.1.mlp.up_proj.weight"
    own = model.tensors[name]
    assert isinstance(own, GroupedTensor)

    def read(begin: int, end: int) -> Any:
        groups = own.groups(begin, end)
        codes = groups.codes.copy()
        codes[-1, -1] ^= 1
        return groups._replace(codes=codes)

    other = GroupedTensor(name, own.format, own.shape, read, lambda: None, bits=8, group_size=own.group_size)
    with pytest.raises(CheckpointError, match=f"{name} has other numbers in rows"):
        check_artifact(model.with_tensors({name: other}), tmp_path / "out")
    with pytest.raises(CheckpointError, match="is int8 in rows"):
        check_artifact(stories, tmp_path / "out")


def test_an_output_that_is_there_is_left_alone(stories: WorkingModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OptionError, match="is there already"):
        write_artifact(stories, tmp_path / "out", {})
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_failure_leaves_nothing(
    stories: WorkingModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr("fastserve.compress.artifact.check_artifact", fail)
    with pytest.raises(OSError, match="no space"):
        write_artifact(stories, tmp_path / "out", {})
    assert list(tmp_path.iterdir()) == []
