"""Adapters beside a base model: what comes out is what peft computes, whoever else is in the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from encoder_decoder_configs import ENCODER_DECODERS
from fastserve.checkpoint.adapter import open_adapter
from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.engine.blueprint import read_ending
from fastserve.errors import CheckpointError, OptionError, UnsupportedError
from fastserve.graph.passes import optimize
from fastserve.models.adapter import fit_adapter
from fastserve.models.family import arrange_tensors, build_graph, build_source_encoder, read_config
from fastserve.types import NO_ADAPTER, Batch, Executable, Float32Array, Limits, LowRankMatrices
from parity import BACKENDS, RANGE_BOUND, Run, make_batch, range_error
from source_parity import (
    Graphs,
    Target,
    compile_graphs,
    encode_sources,
    load_graphs,
    run_target,
    step_targets,
)
from tiny_adapters import MODELS, VOCAB, make_adapter, make_model
from tiny_models import random_encoder_decoder

LIMITS = Limits(
    max_tokens=64,
    max_outputs=64,
    max_sequences=4,
    num_blocks=32,
    max_context=96,
    num_adapter_slots=3,
    max_adapter_rank=8,
)
DECODERS = ("llama", "patterns", "gpt2", "gpt_neox", "dora", "gpt2 dora", "gpt_neox dora", "own head")
ENCODERS = ("bert", "albert")


def compile_model(folder: Path, backend: str, limits: Limits = LIMITS, **options: Any) -> Executable:
    checkpoint = open_checkpoint(folder)
    config = read_config(checkpoint.config)
    tensors = arrange_tensors(config, checkpoint.tensors)
    graph = build_graph(config, tensors.keys(), ending=read_ending(checkpoint, config))
    names = {name for node in graph.nodes for p in node.parameters() for name in p.names}
    parameters = {name: to_f32(tensors[name]) for name in names}
    return BACKENDS[backend](optimize(graph), parameters, limits=limits, **{"kv_dtype": "f32"} | options)


def fit(base: Path, adapter: Path, max_rank: int = 8) -> Mapping[str, LowRankMatrices]:
    checkpoint = open_checkpoint(base)
    config = read_config(checkpoint.config)
    tensors = arrange_tensors(config, checkpoint.tensors)
    graph = build_graph(config, tensors.keys(), ending=read_ending(checkpoint, config))
    if (encoder := build_source_encoder(config, tensors.keys())) is not None:
        graph = graph.beside(encoder)
    return fit_adapter(open_adapter(adapter), graph, config, tensors, max_rank=max_rank)


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, size=length).tolist()


def run(executable: Executable, texts: Sequence[Sequence[int]], slots: Sequence[int] | None) -> Float32Array:
    """Logits, or embeddings, of texts in one step, each with the adapter of its slot."""
    batch = make_batch([(Run(executable, place), ids) for place, ids in enumerate(texts)])
    if slots is not None:
        batch = replace(batch, adapter_slots=np.asarray(slots, np.int32))
    (output,) = executable.run(batch).outputs.values()
    return output.copy()


def expected_logits(theirs: Any, ids: Sequence[int]) -> Float32Array:
    with torch.no_grad():
        out = theirs(input_ids=torch.tensor([ids]))
    if hasattr(out, "logits"):
        return np.atleast_2d(out.logits[0].numpy())
    return np.asarray(out.last_hidden_state.mean(1).numpy())


def greedy(executable: Executable, ids: list[int], slot: int, count: int) -> list[int]:
    """One step a token, over the keys and values of those before."""
    state, new_ids, completion = Run(executable), list(ids), []
    for _ in range(count):
        batch: Batch = replace(make_batch([(state, new_ids)]), adapter_slots=np.array([slot], np.int32))
        logits = executable.run(batch).outputs["logits"]
        state.token_ids.extend(new_ids)
        new_ids = [int(logits[-1].argmax())]
        completion += new_ids
    return completion


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_with_an_adapter_are_those_of_peft(tmp_path: Path, name: str, backend: str) -> None:
    model = make_model(tmp_path / "base", name)
    theirs = make_adapter(tmp_path / "a", model, name, seed=1)
    most = {"max_rank": 32} if name == "own head" else {}  # as much as it takes to replace it
    limits = replace(LIMITS, max_adapter_rank=most.get("max_rank", 8))
    executable = compile_model(tmp_path / "base", backend, limits)
    executable.set_adapter(1, fit(tmp_path / "base", tmp_path / "a", **most))
    ids = prompt(2, 21)
    plain = run(executable, [ids], [NO_ADAPTER])
    adapted = run(executable, [ids], [1])
    assert range_error(plain, expected_logits(model, ids)) < RANGE_BOUND
    assert range_error(adapted, expected_logits(theirs, ids)) < RANGE_BOUND
    assert range_error(adapted, plain) > 0.01
    if name in DECODERS:
        with torch.no_grad():
            out = theirs.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                max_new_tokens=64,
                min_new_tokens=64,
                do_sample=False,
                pad_token_id=0,
            )
        assert greedy(executable, ids, 1, 64) == out[0, len(ids) :].tolist()


@pytest.mark.parametrize("weights", ["f32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "bert", "dora", "bert classifier"])
def test_a_row_is_bit_for_bit_what_it_is_alone_whatever_its_neighbours_adapters(
    tmp_path: Path, name: str, weights: str
) -> None:
    model = make_model(tmp_path / "base", name)
    for seed in (1, 2):
        make_adapter(tmp_path / str(seed), model, name, seed=seed, rank=3 * seed)
    texts = [prompt(seed, length) for seed, length in ((3, 9), (4, 17), (5, 5), (6, 20))]
    options = {"weights": weights, "threads": 2}
    executable = compile_model(tmp_path / "base", "native", **options)
    never = compile_model(tmp_path / "base", "native", replace(LIMITS, num_adapter_slots=0), **options)
    executable.set_adapter(0, fit(tmp_path / "base", tmp_path / "1"))
    executable.set_adapter(2, fit(tmp_path / "base", tmp_path / "2"))
    slots = [0, NO_ADAPTER, 2, 0]
    together = run(executable, texts, slots)
    alone = [run(executable, [text], [slot]) for text, slot in zip(texts, slots, strict=True)]
    alone[1] = run(never, [texts[1]], None)  # the base has no adapters anywhere
    np.testing.assert_array_equal(together, np.concatenate(alone))
    # What is in other slots, and in which slot an adapter is, makes no difference.
    executable.set_adapter(1, fit(tmp_path / "base", tmp_path / "1"))
    executable.set_adapter(0, None)
    np.testing.assert_array_equal(run(executable, [texts[3]], [1]), alone[3])
    np.testing.assert_array_equal(run(executable, [texts[0]], [0]), run(never, [texts[0]], None))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_integer_weights_with_an_adapter_are_near_what_the_adapter_adds_in_floats(
    tmp_path: Path, weights: str
) -> None:
    model = make_model(tmp_path / "base", "llama")
    make_adapter(tmp_path / "a", model, "llama", seed=1)
    ids = prompt(2, 21)
    matrices = fit(tmp_path / "base", tmp_path / "a")
    outputs = {}
    for backend, options in (("torch", {}), ("native", {"weights": weights})):
        executable = compile_model(tmp_path / "base", backend, **options)
        executable.set_adapter(0, matrices)
        outputs[backend] = [run(executable, [ids], [slot]) for slot in (NO_ADAPTER, 0)]
    plain_error, adapted_error = (
        range_error(native, theirs)
        for native, theirs in zip(outputs["native"], outputs["torch"], strict=True)
    )
    assert adapted_error < 2 * plain_error + 0.005  # of the base's rounding


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slot_gives_what_was_put_there_last(tmp_path: Path, backend: str) -> None:
    model = make_model(tmp_path / "base", "llama")
    theirs = [make_adapter(tmp_path / str(seed), model, "llama", seed=seed) for seed in (1, 2)]
    narrow = make_adapter(tmp_path / "3", model, "llama", seed=3, target_modules=["v_proj"])
    executable = compile_model(tmp_path / "base", backend)
    ids = prompt(2, 12)
    for folder, model_with in (("1", theirs[0]), ("2", theirs[1]), ("3", narrow), ("1", theirs[0])):
        executable.set_adapter(0, fit(tmp_path / "base", tmp_path / folder))
        assert range_error(run(executable, [ids], [0]), expected_logits(model_with, ids)) < RANGE_BOUND
    executable.set_adapter(0, None)
    assert range_error(run(executable, [ids], [0]), expected_logits(model, ids)) < RANGE_BOUND


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slot_that_there_is_not_is_refused(tmp_path: Path, backend: str) -> None:
    make_model(tmp_path / "base", "llama")
    executable = compile_model(tmp_path / "base", backend)
    for slots in ([3], [-2], [0, 0]):
        with pytest.raises(OptionError, match=r"adapter|differ"):
            run(executable, [[1, 2]], slots)
    with pytest.raises(OptionError, match=r"slot 3 is outside 0\.\.2"):
        executable.set_adapter(3, {})
    square = LowRankMatrices(np.zeros((2, 32), np.float32), np.zeros((31, 2), np.float32))
    with pytest.raises(OptionError, match="have shapes"):
        executable.set_adapter(0, {"model.layers.0.self_attn.q_proj.weight": square})
    with pytest.raises(OptionError, match="no linear"):
        executable.set_adapter(0, {"model.norm.weight": square})


def test_an_adapter_of_another_model_is_refused_with_all_that_differs(tmp_path: Path) -> None:
    model = make_model(tmp_path / "llama", "llama")
    make_adapter(tmp_path / "a", model, "llama", seed=1)
    make_model(tmp_path / "gpt2", "gpt2")
    with pytest.raises(CheckpointError, match=r"is not there; .*; and 9 more") as error:
        fit(tmp_path / "gpt2", tmp_path / "a")
    assert error.value.hint is not None
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    first, second = [name for name in tensors if name.endswith("lora_A.weight")][:2]
    tensors[first] = tensors[first][:, :-1].copy()
    tensors[second][0, 0] = np.nan
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"the adapter's \[32, 47\]; .* not finite"):
        fit(tmp_path / "llama", tmp_path / "a")


def test_what_cannot_be_added_beside_a_model_is_refused_with_the_remedy(tmp_path: Path) -> None:
    model = make_model(tmp_path / "base", "llama")
    make_adapter(tmp_path / "embedding", model, "llama", seed=1, target_modules=["embed_tokens", "q_proj"])
    make_adapter(tmp_path / "wide", model, "llama", seed=1, rank=9)
    make_adapter(tmp_path / "norm", model, "llama", seed=1, modules_to_save=["norm", "embed_tokens"])
    make_adapter(
        tmp_path / "head", model, "llama", seed=1, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    for name, changed in (("embedding", r"model\.embed_tokens"), ("norm", r"model\.(embed_tokens|norm)")):
        with pytest.raises(UnsupportedError, match=f"changes {changed}") as error:
            fit(tmp_path / "base", tmp_path / name)
        assert "fastserve convert MODEL --adapter" in (error.value.hint or "")
    replaces = r"replaces a layer, which takes rank 32 at lm_head, the limit is max_adapter_rank=8"
    with pytest.raises(OptionError, match=replaces) as refused:
        fit(tmp_path / "base", tmp_path / "head")
    assert "set max_adapter_rank to 32 or more, or merge it" in (refused.value.hint or "")
    with pytest.raises(OptionError, match=r"has rank 9 at .*, the limit is max_adapter_rank=8"):
        fit(tmp_path / "base", tmp_path / "wide")


def test_a_head_that_the_model_has_not_or_of_other_labels_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "base", "bert classifier")
    make_adapter(tmp_path / "a", model, "bert classifier", seed=1)
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.classifier.weight"
    save_file(tensors | {name: tensors[name][:2].copy()}, path)
    with pytest.raises(CheckpointError, match=r"classifier has shape \[3, 32\], the adapter's \[2, 32\]"):
        fit(tmp_path / "base", tmp_path / "a")
    save_file(tensors | {name.replace("weight", "bias"): np.full(3, np.inf, np.float32)}, path)
    with pytest.raises(CheckpointError, match="classifier has numbers that are not finite"):
        fit(tmp_path / "base", tmp_path / "a")
    save_file(tensors, path)
    model.bert.save_pretrained(tmp_path / "headless")
    with pytest.raises(CheckpointError, match="classifier is not there"):
        fit(tmp_path / "headless", tmp_path / "a")


@dataclass(frozen=True)
class Translator:
    """A base, and adapters of it: `theirs` is what peft computes, `matrices` what is fitted."""

    graphs: Graphs
    base: Any
    theirs: list[Any]
    matrices: list[Mapping[str, LowRankMatrices]]

    @classmethod
    def make(cls, folder: Path, name: str) -> Translator:
        model = random_encoder_decoder(ENCODER_DECODERS[name])
        model.save_pretrained(folder / "base")
        modules = ["q", "v", "o", "wi", "wo"] if "t5" in name else ["q_proj", "k_proj", "out_proj", "fc1"]
        theirs = [
            make_adapter(
                folder / str(seed), model, "llama", seed=seed, target_modules=modules, use_dora=seed == 2
            )
            for seed in (1, 2)
        ]
        matrices = [fit(folder / "base", folder / str(seed)) for seed in (1, 2)]
        return cls(load_graphs(folder / "base"), model, theirs, matrices)


def logits_of(model: Any, source_ids: list[int], target_ids: list[int]) -> Float32Array:
    with torch.no_grad():
        out = model(input_ids=torch.tensor([source_ids]), decoder_input_ids=torch.tensor([target_ids]))
    return np.asarray(out.logits[0].numpy())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["t5", "marian"])
def test_logits_of_an_encoder_decoder_with_an_adapter_are_those_of_peft(
    tmp_path: Path, name: str, backend: str
) -> None:
    made = Translator.make(tmp_path, name)
    executable = compile_graphs(backend, made.graphs, num_adapter_slots=2)
    source, target = prompt(3, 40), prompt(4, 20)
    plain = run_target(executable, source, target)
    assert range_error(plain, logits_of(made.base, source, target)) < RANGE_BOUND
    for slot, (matrices, theirs) in enumerate(zip(made.matrices, made.theirs, strict=True)):
        executable.set_adapter(slot, matrices)
        assert {name.split(".")["model." in name] for name in matrices} == {"encoder", "decoder"}
        expected = logits_of(theirs, source, target)
        assert range_error(expected, plain) > 0.01
        for chunk in (1000, 7):
            ours = run_target(executable, source, target, chunk, adapter_slot=slot)
            assert range_error(ours, expected) < RANGE_BOUND


@pytest.mark.parametrize("weights", ["f32", "int8"])
def test_a_target_is_bit_for_bit_what_it_is_alone_whatever_its_neighbours_adapters(
    tmp_path: Path, weights: str
) -> None:
    made = Translator.make(tmp_path, "t5")
    executable = compile_graphs("native", made.graphs, num_adapter_slots=2, weights=weights)
    for slot, matrices in enumerate(made.matrices):
        executable.set_adapter(slot, matrices)
    slots = [1, NO_ADAPTER, 0, 1]
    sources = [prompt(seed, length) for seed, length in ((5, 33), (6, 9), (7, 40), (8, 1))]
    target = prompt(9, 12)
    targets = [Target(executable, ids, place, slots[place]) for place, ids in enumerate(sources)]
    encode_sources(targets)
    together = step_targets([(one, target) for one in targets])
    never = compile_graphs("native", made.graphs, weights=weights)
    for slot, source, ours in zip(slots, sources, together, strict=True):
        alone = run_target(never if slot == NO_ADAPTER else executable, source, target, adapter_slot=slot)
        np.testing.assert_array_equal(ours, alone)
