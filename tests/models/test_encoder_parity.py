"""Every family of encoders and every feature of it against `transformers`, on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastserve.errors import UnsupportedError
from fastserve.models.family import build_graph, read_config
from fastserve.models.parameters import expected_parameters
from fastserve.types import Float32Array
from parity import BACKENDS, RANGE_BOUND, compile_graph, range_error, run_embeddings
from tiny_encoders import ENCODERS, hf_encoder, hf_vectors
from tiny_models import hf_parameters

SHORT_TEXTS = [list(range(5, 45)), [7], [3, 3, 96, 12, 50]]


def texts_for(config: dict[str, Any]) -> list[list[int]]:
    """Texts as long as the family's context, up to one that is longer than all that a relative bias tells
    apart, and short ones."""
    length = min(170, read_config(config).max_context)
    return [np.random.default_rng(0).integers(5, 97, length).tolist(), *SHORT_TEXTS]


def run(backend: str, config: dict[str, Any], parameters: dict[str, Float32Array]) -> Float32Array:
    graph = build_graph(read_config(config))
    try:
        executable = compile_graph(backend, graph, parameters, max_context=192)
    except UnsupportedError as error:
        pytest.skip(error.message)
    long, *short = texts_for(config)
    return np.concatenate([run_embeddings(executable, [long]), run_embeddings(executable, short)])


def expect(config: dict[str, Any], model: Any) -> Float32Array:
    return np.stack([hf_vectors(model, ids).mean(0) for ids in texts_for(config)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ENCODERS)
def test_embeddings_equal_the_mean_that_transformers_gives(backend: str, name: str) -> None:
    config = ENCODERS[name]
    model = hf_encoder(config)
    assert range_error(run(backend, config, hf_parameters(model)), expect(config, model)) < RANGE_BOUND


@pytest.mark.parametrize("name", ENCODERS)
def test_a_family_reads_exactly_what_transformers_saves(name: str) -> None:
    config = ENCODERS[name]
    saved = {key: array.shape for key, array in hf_parameters(hf_encoder(config)).items()}
    assert expected_parameters(build_graph(read_config(config))) == saved
