"""Adapters of a model in this process: chosen by prompt, loaded and swapped while it stays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eviction import evict_again_and_again

from encoder_decoder_configs import MARIAN
from fastserve.cli.main import main
from fastserve.engine.adapter_table import AdapterTable
from fastserve.engine.llm import LLM
from fastserve.engine.loaded_model import Ensemble
from fastserve.errors import CheckpointError, ModelNotFoundError, OptionError, UnsupportedError
from fastserve.evaluate.random_model import make_byte_tokenizer
from fastserve.types import SamplingParams
from tiny_adapters import make_adapter, make_stories_adapter
from tiny_heads import save_bert_head
from tiny_models import random_encoder_decoder

PROMPTS = ["Once upon a time", "Lily and Ben", "The dog was", "One day, a"]
PARAMS = SamplingParams(max_tokens=64, ignore_eos=True)
EXACT = {"weights": "f32", "kv_dtype": "f32"}


@pytest.fixture(scope="module")
def adapters(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: make_stories_adapter(folder / name, stories, seed=seed) for seed, name in enumerate("abc")}


@pytest.fixture
def llm(stories: Path, adapters: dict[str, Path]) -> Iterator[LLM]:
    with LLM(stories, **EXACT, adapters=adapters, max_adapters=2) as llm:
        yield llm


def tokens(llm: LLM, prompt: str, adapter: str | None) -> tuple[int, ...]:
    return tuple(llm.generate(prompt, PARAMS, adapter=adapter)[0].token_ids)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_what_comes_with_an_adapter_is_what_the_merged_model_writes(
    stories: Path, adapters: dict[str, Path], tmp_path: Path, backend: str
) -> None:
    arguments = ["convert", str(stories), "--to", "safetensors", "--output", str(tmp_path / "merged")]
    assert main([*arguments, "--adapter", str(adapters["a"])]) == 0
    with LLM(tmp_path / "merged", **EXACT, backend=backend) as merged:
        expected = [tokens(merged, prompt, None) for prompt in PROMPTS]
    with LLM(stories, **EXACT, backend=backend, adapters={"a": adapters["a"]}) as llm:
        assert [tokens(llm, prompt, "a") for prompt in PROMPTS] == expected
        assert tokens(llm, PROMPTS[0], None) != expected[0]


@pytest.mark.parametrize("weights", ["f32", "int8", "int4"])
def test_more_adapters_than_slots_in_one_call_give_each_prompt_what_it_gets_alone(
    stories: Path, adapters: dict[str, Path], weights: str
) -> None:
    with LLM(stories, weights=weights, adapters=adapters, max_adapters=2, max_sequences=5) as llm:
        choices = ["a", None, "b", "c"] * 3
        prompts = PROMPTS * 3
        together = llm.generate(prompts, PARAMS, adapter=choices)
        assert [c.finish_reason for c in together] == ["length"] * 12
        for prompt, adapter, completion in zip(prompts[:4], choices, together, strict=False):
            assert tuple(completion.token_ids) == tokens(llm, prompt, adapter)
    with LLM(stories, weights=weights) as plain:  # without room for any
        assert tuple(together[1].token_ids) == tokens(plain, PROMPTS[1], None)


def test_an_adapter_is_swapped_while_the_model_stays_and_what_runs_goes_on_as_it_began(
    llm: LLM, adapters: dict[str, Path]
) -> None:
    old, new = (tokens(llm, PROMPTS[0], name) for name in "ab")
    assert old != new
    stream = llm.stream(PROMPTS[0], PARAMS, adapter="a")
    begun = [next(stream).token_id]
    llm.load_adapter("a", adapters["b"])
    assert tokens(llm, PROMPTS[0], "a") == new
    assert (*begun, *(chunk.token_id for chunk in stream)) == old
    llm.unload_adapter("a")
    assert llm.adapters == ("b", "c")
    with pytest.raises(ModelNotFoundError, match="has no adapter 'a'") as error:
        llm.generate(PROMPTS[0], adapter="a")
    assert error.value.hint == "it has b, c"


def test_what_comes_with_a_dora_adapter_is_what_the_merged_model_writes(
    stories: Path, tmp_path: Path
) -> None:
    dora = make_stories_adapter(tmp_path / "dora", stories, seed=0, use_dora=True)
    arguments = ["convert", str(stories), "--to", "safetensors", "--output", str(tmp_path / "merged")]
    assert main([*arguments, "--adapter", str(dora)]) == 0
    with LLM(tmp_path / "merged", **EXACT) as merged:
        expected = [tokens(merged, prompt, None) for prompt in PROMPTS]
    with LLM(stories, **EXACT, adapters={"a": dora}) as llm:
        assert [tokens(llm, prompt, "a") for prompt in PROMPTS] == expected


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Marian in `base`, and adapters of it."""
    folder = tmp_path_factory.mktemp("translator")
    model = random_encoder_decoder({**MARIAN, "vocab_size": 300})
    model.save_pretrained(folder / "base")
    (folder / "base" / "tokenizer.json").write_text(json.dumps(make_byte_tokenizer(300)))
    for seed, name in enumerate("abc"):
        make_adapter(folder / name, model, "llama", seed=seed, target_modules=["q_proj", "v_proj", "fc1"])
    make_adapter(folder / "dora", model, "llama", seed=7, target_modules=["k_proj", "fc2"], use_dora=True)
    return folder


SAMPLED = {"temperature": 1.0, "seed": 5, "logit_bias": {0: -100.0}}


@pytest.mark.parametrize("options", [SAMPLED, {"num_beams": 3, "n": 2}], ids=["sampled", "beams"])
def test_an_encoder_decoder_writes_with_adapters_what_the_merged_models_write(
    translator: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    params = SamplingParams(max_tokens=20, **options)
    expected = {}
    for name in ("a", "b", "c", None):
        path = translator / "base"
        if name is not None:
            path = tmp_path / name
            arguments = ["convert", str(translator / "base"), "--to", "safetensors", "--output", str(path)]
            assert main([*arguments, "--adapter", str(translator / name)]) == 0
        with LLM(path, **EXACT, context_length=128) as llm:
            expected[name] = [[c.token_ids for c in llm.generate(p, params)] for p in PROMPTS]
    assert len({str(found) for found in expected.values()}) == 4
    adapters = {name: translator / name for name in "abc"}
    choices = ["a", None, "b", "c"] * 3
    with LLM(translator / "base", **EXACT, context_length=128, adapters=adapters, max_adapters=2) as llm:
        together = llm.generate(PROMPTS * 3, params, adapter=choices)
    found = [list(c.token_ids) for c in together]
    n = options.get("n", 1)
    for place, adapter in enumerate(choices):
        own = [list(ids) for ids in expected[adapter][place % 4]]
        assert found[place * n : (place + 1) * n] == own


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_what_runs_goes_on_as_it_began_while_adapters_are_swapped_and_sequences_displaced(
    kind: str,
    request: pytest.FixtureRequest,
    stories: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """LoRA and DoRA, more than there are slots, in a pool that holds a few of the texts."""
    if kind == "decoder":
        base, options = stories, {}
        paths = dict(request.getfixturevalue("adapters"))
        paths["dora"] = make_stories_adapter(tmp_path / "dora", stories, seed=7, use_dora=True)
    else:
        folder: Path = request.getfixturevalue("translator")
        base, options = folder / "base", {"context_length": 128}
        paths = {name: folder / name for name in "abc"}
        paths["dora"] = folder / "dora"
    params = SamplingParams(max_tokens=40, ignore_eos=True, **SAMPLED)

    def write(llm: LLM, prompt: str, name: str | None) -> list[int]:
        return list(llm.generate(prompt, params, adapter=name)[0].token_ids)

    choices = ["a", None, "dora", "b", "c", None, "dora", "b"]
    prompts = [prompt for prompt in PROMPTS[:2] for _ in range(4)]
    with LLM(base, **EXACT, **options, adapters=paths, max_adapters=4) as llm:
        block_bytes = llm.model.executable.block_bytes
        alone = [write(llm, prompt, name) for prompt, name in zip(prompts, choices, strict=True)]
        new = write(llm, PROMPTS[2], "c")
    assert len({str(ids) for ids in [*alone, new]}) == 9
    options |= {"kv_memory": 8 * block_bytes, "max_sequences": 6}
    with LLM(base, **EXACT, **options, adapters=paths, max_adapters=2) as llm:
        written: list[int] = []
        executable = llm.model.executable
        set_adapter = executable.set_adapter

        def count(slot: int, matrices: Any) -> None:
            written.append(slot)
            set_adapter(slot, matrices)

        monkeypatch.setattr(executable, "set_adapter", count)
        evict_again_and_again(llm)
        streams = [
            llm.stream(prompt, params, adapter=name) for prompt, name in zip(prompts, choices, strict=True)
        ]
        found = [[next(stream).token_id] for stream in streams[:2]]
        llm.load_adapter("a", paths["c"])
        found += [[next(stream).token_id] for stream in streams[2:]]
        llm.unload_adapter("dora")
        assert write(llm, PROMPTS[2], "a") == new
        for ids, stream in zip(found, streams, strict=True):
            ids += [chunk.token_id for chunk in stream]
        assert llm._engine is not None
        assert llm._engine.scheduler.residency.counters.evictions > 10
    assert found == alone
    assert len(written) > 4  # adapters were put in again in place of others


def test_speculation_changes_nothing_with_an_adapter(stories: Path, adapters: dict[str, Path]) -> None:
    outputs = []
    for options in ({}, {"speculation": "prompt-lookup"}, {"speculation": "draft", "draft_layers": 2}):
        with LLM(stories, **EXACT, adapters={"a": adapters["a"]}, **options) as llm:
            outputs.append([tokens(llm, prompt, "a") for prompt in PROMPTS])
    assert outputs[0] == outputs[1] == outputs[2]


def test_adapters_that_do_not_fit_the_options_are_refused_by_name(
    stories: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    wide = make_stories_adapter(tmp_path / "wide", stories, seed=0, rank=12)
    with pytest.raises(OptionError, match=r"wide has rank 12 at .*, the limit is max_adapter_rank=8"):
        LLM(stories, adapters={"wide": wide}, max_adapter_rank=8)
    norms = make_stories_adapter(tmp_path / "norms", stories, seed=0, modules_to_save=["norm"])
    with pytest.raises(UnsupportedError, match="only linear layers can have adapters"):
        LLM(stories, adapters={"norms": norms})
    with pytest.raises(OptionError, match="an adapter cannot be called 'x:y'"):
        LLM(stories, adapters={"x:y": adapters["a"]})
    with pytest.raises(OptionError, match="max_adapters=0 leaves no room"):
        LLM(stories, adapters=adapters, max_adapters=0)
    with LLM(stories) as plain, pytest.raises(OptionError, match="without room for adapters"):
        plain.load_adapter("a", adapters["a"])
    broken = tmp_path / "broken"
    shutil.copytree(adapters["a"], broken)
    (broken / "adapter_model.safetensors").write_bytes(b"none")
    with LLM(stories, max_adapters=1) as llm:
        with pytest.raises(CheckpointError):
            llm.load_adapter("broken", broken)
        assert llm.adapters == ()
        llm.load_adapter("a", adapters["a"])
        assert llm.generate(PROMPTS[0], PARAMS, adapter="a")[0].completion_tokens == 64


def test_an_encoder_embeds_with_adapters_more_than_it_has_slots(tmp_path: Path) -> None:
    import transformers

    folder = save_bert_head(tmp_path / "base", "")
    model = transformers.AutoModel.from_pretrained(folder)
    paths = {}
    for seed, name in enumerate("ab"):
        paths[name] = tmp_path / name
        make_adapter(paths[name], model, "bert", seed=seed)
    texts = ["the cat sat", "ada love in london"]
    with LLM(folder, adapters=paths, max_adapters=1) as llm:
        plain = llm.embed(texts)
        first, second = (llm.embed(texts, adapter=name) for name in "ab")
        assert np.abs(first - second).max() > 1e-3
        assert np.abs(first - plain).max() > 1e-3
        np.testing.assert_array_equal(llm.embed(texts, adapter="a"), first)
        np.testing.assert_array_equal(llm.embed(texts[1], adapter="b"), second[1:])
        np.testing.assert_array_equal(llm.embed(texts), plain)


def test_an_ensemble_is_not_told_to_make_room_for_adapters(stories: Path, adapters: dict[str, Path]) -> None:
    with LLM(stories) as llm:
        ensemble = replace(llm.model, ensemble=Ensemble((llm.model, llm.model), lambda said: said[0]))
        table = AdapterTable(ensemble, model_name="both")
        with pytest.raises(UnsupportedError, match="'both' is an ensemble, which has no adapters"):
            table.load("a", adapters["a"])
