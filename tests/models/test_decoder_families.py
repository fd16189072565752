"""Every decoder family and every feature of it against `transformers`: tiny random models, saved, loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decoder_configs import DECODERS, Config
from fastserve.graph.node import (
    Activation,
    Attention,
    Embedding,
    GatedActivation,
    Graph,
    LayerNorm,
    MixtureOfExperts,
    Node,
    RmsNorm,
    Rope,
    SoftCap,
)
from fastserve.types import Executable, Float32Array
from parity import BACKENDS, RANGE_BOUND, compile_graph, load_model, range_error, run_greedy, run_logits
from tiny_models import random_language_model

PROMPT: list[int] = np.random.default_rng(5).integers(0, 97, 70).tolist()


@dataclass(frozen=True)
class Decoder:
    """A saved model, and what `transformers` computes of it."""

    folder: Path
    graph: Graph
    parameters: dict[str, Float32Array]
    model: Any  # of transformers

    def logits(self, token_ids: list[int]) -> Float32Array:
        """[tokens, vocab]."""
        import torch

        with torch.no_grad():
            return np.asarray(self.model(torch.tensor([token_ids])).logits[0].numpy())


@pytest.fixture(scope="module")
def decoder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Decoder]:
    @cache
    def make(name: str) -> Decoder:
        return make_decoder(DECODERS[name], tmp_path_factory.mktemp("model"))

    return make


def make_decoder(config: Config, folder: Path) -> Decoder:
    model = random_language_model(config)
    model.save_pretrained(folder)
    return Decoder(folder, *load_model(folder), model)


def compile_or_skip(backend: str, graph: Graph, parameters: dict[str, Float32Array]) -> Executable:
    """A node that the native backend does not run yet skips the test, which says so."""
    try:
        return compile_graph(backend, graph, parameters)
    except AssertionError as error:
        if "has no native call" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DECODERS)
def test_logits_and_greedy_tokens_equal_those_of_transformers(
    name: str, backend: str, decoder_of: Callable[[str], Decoder]
) -> None:
    decoder = decoder_of(name)
    executable = compile_or_skip(backend, decoder.graph, decoder.parameters)
    expected = decoder.logits(PROMPT)
    assert range_error(run_logits(executable, PROMPT), expected) < RANGE_BOUND
    assert range_error(run_logits(executable, PROMPT, chunk=17), expected) < RANGE_BOUND
    prompt = PROMPT[:9]
    completion = run_greedy(executable, prompt, 64)
    # Each of them is the best of `transformers` after those before it: what its own greedy search would find.
    assert completion == decoder.logits(prompt + completion)[len(prompt) - 1 : -1].argmax(1).tolist()


# Mutations: what a plausible mistake changes must be more than the bound allows.


def with_eps_times_10(node: Node) -> Node:
    return replace(node, eps=10 * node.eps) if isinstance(node, RmsNorm | LayerNorm) else node


def with_other_gelu(node: Node) -> Node:
    if isinstance(node, Activation | GatedActivation):
        return replace(node, kind="gelu" if node.kind == "gelu_tanh" else "gelu_tanh")
    return node


def with_windows_one_wider(node: Node) -> Node:
    if isinstance(node, Attention) and node.window is not None:
        return replace(node, window=node.window + 1)
    return node


def without_windows(node: Node) -> Node:
    return replace(node, window=None) if isinstance(node, Attention) else node


def without_caps_of_scores(node: Node) -> Node:
    return replace(node, soft_cap=None) if isinstance(node, Attention) else node


def with_another_cap_of_logits(node: Node) -> Node:
    return replace(node, cap=1.01 * node.cap) if isinstance(node, SoftCap) else node


def with_another_scale_of_scores(node: Node) -> Node:
    return replace(node, scale=1.01 * node.scale) if isinstance(node, Attention) else node


def with_plain_norms(node: Node) -> Node:
    return replace(node, offset=0.0) if isinstance(node, RmsNorm) else node


def with_plain_embeddings(node: Node) -> Node:
    return replace(node, scale=1.0) if isinstance(node, Embedding) else node


def with_positions_off_by_one(node: Node) -> Node:
    if isinstance(node, Embedding) and node.ids == "positions":
        return replace(node, offset=node.offset + 1)
    return node


def with_turns_one_percent_faster(node: Node) -> Node:
    if not isinstance(node, Rope):
        return node
    frequencies = tuple(1.01 * frequency for frequency in node.table.inverse_frequencies)
    return replace(node, table=replace(node.table, inverse_frequencies=frequencies))


def with_plain_rope_scale(node: Node) -> Node:
    return replace(node, table=replace(node.table, scale=1.0)) if isinstance(node, Rope) else node


def with_one_expert_less(node: Node) -> Node:
    return replace(node, top_k=node.top_k - 1) if isinstance(node, MixtureOfExperts) else node


def with_shares_normalized_or_not(node: Node) -> Node:
    return replace(node, normalized=not node.normalized) if isinstance(node, MixtureOfExperts) else node


MUTATIONS: list[tuple[str, Callable[[Node], Node]]] = [
    ("llama, yarn rope", with_plain_rope_scale),
    ("llama, longrope", with_plain_rope_scale),
    ("llama, dynamic rope", with_turns_one_percent_faster),
    ("mistral, window", with_windows_one_wider),
    ("qwen2, tied, windows", with_windows_one_wider),
    ("qwen3", with_eps_times_10),
    ("gemma2", with_other_gelu),
    ("gemma2", without_caps_of_scores),
    ("gemma2", with_another_cap_of_logits),
    ("gemma2", with_another_scale_of_scores),
    ("gemma3", with_plain_norms),
    ("gemma3", with_plain_embeddings),
    ("gemma3", with_turns_one_percent_faster),
    ("gemma3", without_windows),
    ("phi3, longrope", with_plain_rope_scale),
    ("mixtral", with_one_expert_less),
    ("qwen2_moe", with_shares_normalized_or_not),
    ("qwen3_moe", with_shares_normalized_or_not),
    ("gpt2", with_other_gelu),
    ("gpt2", with_eps_times_10),
    ("gpt2", with_positions_off_by_one),
    ("gpt_neox", with_other_gelu),
    ("gpt_neox", with_turns_one_percent_faster),
    ("opt", with_positions_off_by_one),
    ("opt", with_eps_times_10),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "change"), MUTATIONS, ids=lambda part: part if isinstance(part, str) else part.__name__
)
def test_a_plausible_mistake_exceeds_the_bound(
    name: str, change: Callable[[Node], Node], backend: str, decoder_of: Callable[[str], Decoder]
) -> None:
    decoder = decoder_of(name)
    graph = Graph(tuple(change(node) for node in decoder.graph.nodes), decoder.graph.outputs)
    assert graph != decoder.graph
    executable = compile_or_skip(backend, graph, decoder.parameters)
    assert range_error(run_logits(executable, PROMPT), decoder.logits(PROMPT)) > RANGE_BOUND


@pytest.mark.parametrize("name", ["llama, longrope", "phi3, longrope"])
def test_longrope_uses_the_long_factors_where_texts_may_be_long(name: str, tmp_path: Path) -> None:
    """`transformers` chooses by each text's length; ours by the longest that the model is compiled for."""
    prompt = np.random.default_rng(6).integers(0, 97, 300).tolist()  # longer than 256, the original context
    expected = make_decoder(DECODERS[name], tmp_path).logits(prompt)
    graph, parameters = load_model(tmp_path, context_length=300)
    assert range_error(run_logits(compile_graph("torch", graph, parameters), prompt), expected) < RANGE_BOUND
    graph, parameters = load_model(tmp_path, context_length=256)
    assert range_error(run_logits(compile_graph("torch", graph, parameters), prompt), expected) > RANGE_BOUND


def test_the_text_part_of_a_gemma_for_images_is_the_gemma(tmp_path: Path) -> None:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    text = {key: value for key, value in DECODERS["gemma3"].items() if key != "model_type"}
    vision = SiglipVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=4,
        patch_size=2,
    )
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**text),
        vision_config=vision,
        image_token_index=96,
        mm_tokens_per_image=4,
    )
    model = random_language_model(config, Gemma3ForConditionalGeneration)
    model.save_pretrained(tmp_path)
    prompt = [token_id for token_id in PROMPT if token_id != 96]
    graph, parameters = load_model(tmp_path)
    expected = Decoder(tmp_path, graph, parameters, model).logits(prompt)
    assert range_error(run_logits(compile_graph("torch", graph, parameters), prompt), expected) < RANGE_BOUND
