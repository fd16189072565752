"""Every encoder-decoder family and every feature of it against `transformers`: tiny random models, saved,
loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from encoder_decoder_configs import ENCODER_DECODERS, TWO_VOCABULARIES, Config
from fastserve.errors import CheckpointError, OptionError, UnsupportedError
from fastserve.graph.check import check_graph
from fastserve.graph.node import (
    Activation,
    Attention,
    CrossAttention,
    Embedding,
    GatedActivation,
    Graph,
    LayerNorm,
    Node,
    RmsNorm,
    Scale,
)
from fastserve.graph.passes import optimize
from fastserve.models.family import arrange_tensors, read_config
from fastserve.models.marian import sinusoids
from fastserve.types import Float32Array
from parity import BACKENDS, RANGE_BOUND, range_error
from source_parity import (
    Graphs,
    Target,
    compile_graphs,
    encode_sources,
    load_graphs,
    run_greedy_target,
    run_target,
    step_targets,
)
from tiny_models import random_encoder_decoder

ALL = ENCODER_DECODERS | TWO_VOCABULARIES
_RNG = np.random.default_rng(5)
SOURCE: list[int] = _RNG.integers(2, 95, 70).tolist()
TARGET: list[int] = [0, *_RNG.integers(2, 95, 44).tolist()]


@dataclass(frozen=True)
class Model:
    """A saved model, and what `transformers` computes of it."""

    folder: Path
    graphs: Graphs
    model: Any  # of transformers

    def logits(self, source_ids: list[int], target_ids: list[int]) -> Float32Array:
        """[target tokens, vocab]."""
        import torch

        with torch.no_grad():
            out = self.model(torch.tensor([source_ids]), decoder_input_ids=torch.tensor([target_ids]))
            return np.asarray(out.logits[0].numpy())


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    @cache
    def make(name: str) -> Model:
        return make_model(ALL[name], tmp_path_factory.mktemp("model"))

    return make


def make_model(config: Config, folder: Path) -> Model:
    model = random_encoder_decoder(config)
    model.save_pretrained(folder)
    return Model(folder, load_graphs(folder), model)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ALL)
def test_logits_and_greedy_tokens_equal_those_of_transformers(
    name: str, backend: str, model_of: Callable[[str], Model]
) -> None:
    model = model_of(name)
    executable = compile_graphs(backend, model.graphs)
    expected = model.logits(SOURCE, TARGET)
    assert range_error(run_target(executable, SOURCE, TARGET), expected) < RANGE_BOUND
    assert range_error(run_target(executable, SOURCE, TARGET, chunk=17), expected) < RANGE_BOUND
    completion = run_greedy_target(executable, SOURCE, 0, 64)
    assert completion == model.logits(SOURCE, [0, *completion])[:-1].argmax(1).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["t5", "marian"])
def test_sources_of_any_length_share_batches_without_meeting(
    name: str, backend: str, model_of: Callable[[str], Model]
) -> None:
    executable = compile_graphs(backend, model_of(name).graphs)
    sources = [SOURCE, SOURCE[:1], SOURCE[3:36], SOURCE[9:40]]
    targets = [Target(executable, source, place) for place, source in enumerate(sources)]
    encode_sources(targets[:3])
    first = step_targets([(target, TARGET[:5]) for target in targets[:3]])
    encode_sources(targets[3:])  # while the others are under way
    second = step_targets([(targets[3], TARGET[:9]), *((target, TARGET[5:6]) for target in targets[:3])])
    for target, one, other in zip(targets, (*first, second[0]), (*second[1:], second[0][:1]), strict=True):
        alone = run_target(
            compile_graphs(backend, model_of(name).graphs), target.source_ids, target.token_ids
        )
        together = one if target is targets[3] else np.concatenate([one, other])
        if backend == "native":
            assert np.array_equal(together, alone)
        else:
            assert range_error(together, alone) < RANGE_BOUND


@pytest.mark.parametrize("weights", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("name", ["t5 v1.1, gated gelu, own head", "marian"])
def test_rounded_weights_compute_nearly_the_same_however_targets_are_cut(
    name: str, weights: str, tmp_path: Path
) -> None:
    """Of heads as wide as a group of activations, whose results attention itself quantizes."""
    sizes = {"d_kv": 64, "d_ff": 128} if "t5" in name else {"encoder_attention_heads": 2}
    more = {} if "t5" in name else {"decoder_attention_heads": 2, "d_model": 128}
    model = make_model({**ENCODER_DECODERS[name], "d_model": 64, **sizes, **more}, tmp_path)
    for parameter_name, parameter in model.model.named_parameters():
        if parameter_name.endswith(".q.weight"):  # small scores, as T5 is initialized
            parameter.data *= 64**-0.5
            model.graphs.parameters[parameter_name] = parameter.detach().numpy()
    executable = compile_graphs("native", model.graphs, weights=weights)
    whole = run_target(executable, SOURCE, TARGET)
    assert np.array_equal(run_target(executable, SOURCE, TARGET, chunk=1), whole)
    exact = model.logits(SOURCE, TARGET)
    least = {"int8": 0.99, "int4": 0.6, "bf16": 0.999}[weights]
    assert np.corrcoef(whole.ravel(), exact.ravel())[0, 1] > least


@pytest.mark.parametrize("name", ALL)
def test_graphs_hold_what_must_hold_before_and_after_the_passes(
    name: str, model_of: Callable[[str], Model]
) -> None:
    graphs = model_of(name).graphs
    for graph in (graphs.encoder, graphs.decoder):
        check_graph(graph)
        check_graph(optimize(graph))
    num_layers = sum(isinstance(node, CrossAttention) for node in graphs.decoder.nodes)
    assert num_layers == sum(node.op == "store_source" for node in optimize(graphs.encoder).nodes)


# Mutations: what a plausible mistake changes must be more than the bound allows.


def with_eps_times_10(node: Node) -> Node:
    return replace(node, eps=10 * node.eps) if isinstance(node, RmsNorm | LayerNorm) else node


def with_other_gelu(node: Node) -> Node:
    if isinstance(node, Activation | GatedActivation):
        return replace(node, kind="gelu" if node.kind == "gelu_tanh" else "gelu_tanh")
    return node


def with_the_other_kind_of_bias(node: Node) -> Node:
    if isinstance(node, Attention) and node.bias is not None:
        return replace(node, bias=replace(node.bias, bidirectional=not node.bias.bidirectional))
    return node


def with_a_bucket_off_by_one(node: Node) -> Node:
    if isinstance(node, Attention) and node.bias is not None:
        return replace(node, bias=replace(node.bias, max_distance=node.bias.max_distance + 2))
    return node


def with_scores_of_cross_attention_scaled(node: Node) -> Node:
    return replace(node, scale=1.01 * node.scale) if isinstance(node, CrossAttention) else node


def without_scaled_logits(node: Node) -> Node:
    return replace(node, factor=1.0) if isinstance(node, Scale) else node


def with_plain_embeddings(node: Node) -> Node:
    return replace(node, scale=1.0) if isinstance(node, Embedding) else node


def with_positions_off_by_one(node: Node) -> Node:
    if isinstance(node, Embedding) and node.ids == "positions":
        return replace(node, offset=1)
    return node


MUTATIONS: list[tuple[str, Callable[[Node], Node]]] = [
    ("t5", with_eps_times_10),
    ("t5", with_the_other_kind_of_bias),
    ("t5", with_a_bucket_off_by_one),
    ("t5", with_scores_of_cross_attention_scaled),
    ("t5", without_scaled_logits),
    ("t5, gelu", with_other_gelu),
    ("t5 v1.1, gated gelu, own head", with_other_gelu),
    ("marian", with_eps_times_10),
    ("marian", with_other_gelu),
    ("marian", with_positions_off_by_one),
    ("marian", with_scores_of_cross_attention_scaled),
    ("marian, scaled embeddings, swish", with_plain_embeddings),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "change"), MUTATIONS, ids=lambda part: part if isinstance(part, str) else part.__name__
)
def test_a_plausible_mistake_exceeds_the_bound(
    name: str, change: Callable[[Node], Node], backend: str, model_of: Callable[[str], Model]
) -> None:
    model = model_of(name)
    encoder, decoder = (
        Graph(tuple(change(node) for node in graph.nodes), graph.outputs)
        for graph in (model.graphs.encoder, model.graphs.decoder)
    )
    graphs = replace(model.graphs, encoder=encoder, decoder=decoder)
    assert graphs != model.graphs
    actual = run_target(compile_graphs(backend, graphs), SOURCE, TARGET)
    assert range_error(actual, model.logits(SOURCE, TARGET)) > RANGE_BOUND


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_of_the_other_vocabulary_are_refused(backend: str, model_of: Callable[[str], Model]) -> None:
    executable = compile_graphs(backend, model_of("marian, two vocabularies").graphs)
    assert (executable.source_vocab_size, executable.vocab_size) == (97, 120)
    run_target(executable, [96], [119])
    with pytest.raises(OptionError, match=r"token.id"):
        encode_sources([Target(executable, [97])])
    with pytest.raises(OptionError, match=r"token.id"):
        run_target(executable, [96], [120])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kept", ["lm_head.weight", "model.decoder.embed_tokens.weight"])
def test_a_tied_head_is_found_under_either_name(kept: str, backend: str, tmp_path: Path) -> None:
    model = make_model(ALL["marian, two vocabularies"], tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    both = {"lm_head.weight", "model.decoder.embed_tokens.weight"}
    (matrix,) = [tensors.pop(name) for name in both & tensors.keys()]
    save_file({**tensors, kept: matrix}, path)
    found = run_target(compile_graphs(backend, load_graphs(tmp_path)), SOURCE, TARGET)
    assert range_error(found, model.logits(SOURCE, TARGET)) < RANGE_BOUND


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_without_its_sources_is_refused(backend: str, model_of: Callable[[str], Model]) -> None:
    target = Target(compile_graphs(backend, model_of("t5").graphs), [])
    with pytest.raises(OptionError, match="source"):
        target.step([0])


def test_positions_of_marian_are_those_of_transformers(model_of: Callable[[str], Model]) -> None:
    table = model_of("marian").model.model.encoder.embed_positions.weight.numpy()
    assert np.array_equal(sinusoids(0, 128, 32), table)
    assert np.array_equal(sinusoids(5, 9, 32), table[5:9])


def test_a_checkpoint_that_holds_its_positions_is_read_the_same(model_of: Callable[[str], Model]) -> None:
    model = model_of("marian")
    config = read_config(model.model.config.to_dict())
    tensors = {"model.decoder.embed_positions.weight": object(), "model.encoder.embed_positions.weight": 1}
    arranged = arrange_tensors(config, tensors)  # type: ignore[arg-type]
    assert list(arranged) == ["model.encoder.embed_positions.weight"]
    assert arranged["model.encoder.embed_positions.weight"].shape == (128, 32)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("t5", {"feed_forward_proj": "swiglu-gelu"}, UnsupportedError, "feed_forward_proj='swiglu-gelu'"),
        ("t5", {"feed_forward_proj": "gated-mish"}, UnsupportedError, "mish"),
        ("t5", {"is_encoder_decoder": False}, UnsupportedError, "is_encoder_decoder=False"),
        ("t5", {"relative_attention_num_buckets": 6}, UnsupportedError, "6 buckets"),
        ("t5", {"d_kv": None}, CheckpointError, "d_kv"),
        ("t5", {"architectures": ["T5ForSequenceClassification"]}, UnsupportedError, "T5ForSequence"),
        ("marian", {"tie_word_embeddings": False}, UnsupportedError, "tie_word_embeddings=False"),
        ("marian", {"decoder_vocab_size": 98}, UnsupportedError, "decoder_vocab_size=98"),
        ("marian", {"decoder_attention_heads": 8}, UnsupportedError, "decoder_attention_heads=8"),
        ("marian", {"encoder_attention_heads": 5}, CheckpointError, "encoder_attention_heads=5"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    name: str, change: Config, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_config({**ENCODER_DECODERS[name], **change})
