from __future__ import annotations

import numpy as np
import pytest

from fastserve.errors import CheckpointError
from fastserve.graph.passes import optimize
from fastserve.models.family import build_graph, read_config
from fastserve.models.parameters import check_parameters, expected_parameters
from tiny_models import BERT_CONFIG, LLAMA_CONFIG, hf_model, hf_parameters, random_parameters, tiny_graph


@pytest.mark.parametrize("config", [LLAMA_CONFIG, BERT_CONFIG], ids=["llama", "bert"])
def test_a_family_needs_exactly_what_transformers_saves(config: dict[str, object]) -> None:
    saved = {name: array.shape for name, array in hf_parameters(hf_model(config)).items()}
    assert expected_parameters(tiny_graph(config)) == saved


def test_a_tied_llama_reads_its_head_from_the_embedding() -> None:
    graph = tiny_graph({**LLAMA_CONFIG, "tie_word_embeddings": True})
    tensors = random_parameters(tiny_graph(LLAMA_CONFIG))
    assert check_parameters(graph, tensors) == ("lm_head.weight",)


def test_a_bert_saved_under_a_head_is_read_by_its_prefixed_names() -> None:
    tensors = {f"bert.{name}": array for name, array in random_parameters(tiny_graph(BERT_CONFIG)).items()}
    tensors["cls.predictions.bias"] = np.zeros(97, np.float32)
    graph = build_graph(read_config(BERT_CONFIG), tensors)
    assert check_parameters(graph, tensors) == ("cls.predictions.bias",)


def test_a_bert_converted_from_tensorflow_is_read_by_its_gamma_and_beta() -> None:
    renamed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = random_parameters(tiny_graph(BERT_CONFIG))
    for new, old in renamed.items():
        tensors = {name.replace(new, old): array for name, array in tensors.items()}
    assert check_parameters(build_graph(read_config(BERT_CONFIG), tensors), tensors) == ()


def test_missing_and_misshapen_tensors_are_reported_together() -> None:
    graph = tiny_graph(LLAMA_CONFIG)
    tensors = random_parameters(graph)
    tensors["stray"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T
    with pytest.raises(CheckpointError) as caught:
        check_parameters(graph, tensors)
    assert caught.value.message == (
        "the checkpoint does not fit its config; 1 tensor is missing: model.norm.weight;"
        " 1 tensor is of the wrong shape: lm_head.weight ([24, 97], not [97, 24]);"
        " 1 tensor is not used: stray"
    )


def test_a_long_list_is_cut_short_with_its_count() -> None:
    with pytest.raises(CheckpointError, match=r"30 tensors are missing: .* and 25 more"):
        check_parameters(tiny_graph(LLAMA_CONFIG), {})


def test_a_merged_graph_is_not_asked_for_its_parameters() -> None:
    with pytest.raises(AssertionError, match="before optimizing"):
        expected_parameters(optimize(tiny_graph(LLAMA_CONFIG)))
