"""Encoder-decoders through the engine: greedy completions and beams are those of `transformers`, alone and
batched, whatever is evicted."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from encoder_decoder_configs import ENCODER_DECODERS, TWO_VOCABULARIES
from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.generation import read_target_rules
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.constraint import Choice
from fastserve.engine.completion import Completion
from fastserve.engine.llm import LLM
from fastserve.engine.residency import Residency
from fastserve.errors import (
    CheckpointError,
    ContextLengthError,
    OptionError,
    TemplateError,
    UnsupportedError,
)
from fastserve.evaluate.random_model import make_byte_tokenizer
from fastserve.types import SamplingParams
from marian_files import write_two_vocabularies
from parity import BACKENDS
from tiny_models import random_encoder_decoder

VOCAB_SIZE = 300
PROMPTS = ["The dog", "Once upon a time there was a little girl.", "ab" * 40, "x", "Her mother said: " * 3]
Options = dict[str, Any]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def save(name: str) -> Path:
        folder = tmp_path_factory.mktemp("model")
        model = random_encoder_decoder({**ENCODER_DECODERS[name], "vocab_size": VOCAB_SIZE})
        model.save_pretrained(folder)
        (folder / "tokenizer.json").write_text(json.dumps(make_byte_tokenizer(VOCAB_SIZE)))
        return folder

    return save


@cache
def reference(folder: Path) -> Any:
    from transformers import AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


@cache
def generate_by_transformers(
    folder: Path, source_ids: tuple[int, ...], options: tuple[tuple[str, Any], ...]
) -> list[list[int]]:
    """Completions, without the token that begins them and those that fill them up."""
    import torch

    model = reference(folder)
    with torch.no_grad():
        found = model.generate(torch.tensor([source_ids]), do_sample=False, **dict(options)).tolist()
    eos = model.generation_config.eos_token_id
    texts = [tokens[1:] for tokens in found]
    return [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in texts]


def expect(folder: Path, prompts: Sequence[str], **options: Any) -> list[list[int]]:
    """What `transformers` writes for the prompts."""
    names = {"n": "num_return_sequences", "max_tokens": "max_new_tokens"}
    given = tuple((names.get(name, name), value) for name, value in options.items())
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(folder))
    sources = [tuple(tokenizer.encode(prompt)) for prompt in prompts]
    return [tokens for source in sources for tokens in generate_by_transformers(folder, source, given)]


def load(folder: Path, **options: Any) -> LLM:
    return LLM(folder, **{"weights": "f32", "kv_dtype": "f32", "context_length": 128} | options)


def tokens_of(completions: Sequence[Completion]) -> list[list[int]]:
    return [list(completion.token_ids) for completion in completions]


def check_invariants(llm: LLM) -> None:
    """That nothing is left over either."""
    engine = llm._engine
    assert engine is not None
    while engine.has_work:  # blocks of what has ended may be on the way
        engine.step()
    engine.check_invariants()
    assert engine.pool.num_free == engine.pool.num_blocks


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_greedy_completions_equal_those_of_transformers(
    name: str, backend: str, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of(name)
    with load(folder, backend=backend) as llm:
        completions = llm.generate(PROMPTS, SamplingParams(max_tokens=64))
        assert [c.prompt_tokens for c in completions] == [len(prompt) for prompt in PROMPTS]
        check_invariants(llm)
    assert tokens_of(completions) == expect(folder, PROMPTS, max_tokens=64, num_beams=1)


@pytest.mark.filterwarnings("ignore:Recommended")
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_marian_with_two_vocabularies_writes_in_the_other_one(
    shared_data: Path, tmp_path: Path, options: Options
) -> None:
    import torch
    from transformers import AutoModelForSeq2SeqLM, MarianTokenizer

    num_source, num_target = write_two_vocabularies(tmp_path, shared_data)
    config = TWO_VOCABULARIES["marian, two vocabularies"]
    ids = {"pad_token_id": num_source - 1, "decoder_start_token_id": num_target - 1}
    sizes = {"vocab_size": num_source, "decoder_vocab_size": num_target}
    model = random_encoder_decoder({**config, **sizes, **ids})
    model.get_output_embeddings().weight.data[0] /= 8  # </s>: texts of some length
    model.save_pretrained(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    tokenizer = MarianTokenizer.from_pretrained(tmp_path)
    prompts = ["All human beings are born free.", "Everyone has duties to the community", "x"]
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    with load(tmp_path) as llm:
        found = llm.generate(prompts, SamplingParams(max_tokens=24, **options))
        check_invariants(llm)
        with pytest.raises(OptionError, match=f"outside the model's vocabulary of {num_source}"):
            llm.generate([num_source])
        with pytest.raises(OptionError, match=f"outside the model's vocabulary of {num_target}"):
            llm.generate([0], SamplingParams(logit_bias={num_target: 1.0}))
        llm.generate([0], SamplingParams(max_tokens=1, logit_bias={num_target - 1: 1.0}))
        choice = llm.generate(prompts[0], SamplingParams(constraint=Choice(("libres", "égaux"))))[0]
        assert choice.text in ("libres", "égaux")
        target = tokenizer(text_target="Tous les êtres humains naissent libres.")["input_ids"]
        assert llm.model.target_tokenizer.decode(target) == "Tous les êtres humains naissent libres."
        assert llm.model.target_tokenizer.encode("Tous les") == target[:4]
    texts = set()
    for prompt, completion in zip(prompts, found, strict=True):
        source = torch.tensor([tokenizer.encode(prompt)])
        with torch.no_grad():
            (expected,) = theirs.generate(
                source, do_sample=False, max_new_tokens=24, **{"num_beams": 1} | options
            ).tolist()
        assert completion.prompt_tokens == source.shape[1]
        assert [*completion.token_ids] == expected[1:]
        written = [
            id_ for id_ in expected if id_ not in (0, num_target - 1)
        ]  # transformers takes the source's
        assert completion.text == tokenizer.decode(written)
        texts.add(completion.text)
    assert len(texts) > 1


def test_a_marian_whose_targets_have_no_vocabulary_here_is_refused(shared_data: Path, tmp_path: Path) -> None:
    num_source, num_target = write_two_vocabularies(tmp_path, shared_data)
    config = TWO_VOCABULARIES["marian, two vocabularies"]
    sizes = {"vocab_size": num_source, "decoder_vocab_size": num_target + 600}
    random_encoder_decoder({**config, **sizes}).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"tokenizer of {num_target} tokens and a model of"):
        load(tmp_path)
    (tmp_path / "target_vocab.json").unlink()
    with pytest.raises(CheckpointError, match=r"target_vocab\.json"):
        load(tmp_path)


BEAMS: list[Options] = [
    {"num_beams": 4},
    {"num_beams": 4, "length_penalty": 2.0, "n": 4},
    {"num_beams": 3, "length_penalty": -1.0, "early_stopping": True, "n": 2},
    {"num_beams": 4, "length_penalty": 0.5, "early_stopping": "never"},
    {"num_beams": 2, "length_penalty": 0.0, "early_stopping": True},
]


@pytest.mark.parametrize("options", BEAMS, ids=str)
@pytest.mark.parametrize("name", ["t5", "t5 v1.1, gated gelu, own head", "marian"])
def test_beam_search_equals_that_of_transformers(
    name: str, options: Options, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of(name)
    with load(folder) as llm:
        found = llm.generate(PROMPTS, SamplingParams(max_tokens=16, **options))
        check_invariants(llm)
    assert tokens_of(found) == expect(folder, PROMPTS, max_tokens=16, **options)
    assert "stop" in {completion.finish_reason for completion in found}  # else no text has ended


def test_beam_search_on_torch_equals_that_of_transformers(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("t5")
    with load(folder, backend="torch") as llm:
        found = llm.generate(PROMPTS, SamplingParams(max_tokens=16, num_beams=4))
    assert tokens_of(found) == expect(folder, PROMPTS, max_tokens=16, num_beams=4)


LONG: Options = {"max_tokens": 120, "ignore_eos": True}


@pytest.mark.parametrize("options", [LONG, {"max_tokens": 40, "num_beams": 4, "n": 2}], ids=str)
@pytest.mark.parametrize(
    "memory",
    [
        {"kv_memory": 9, "peak_quantile": 0},
        {"kv_memory": 9, "kv_spill": 40, "peak_quantile": 0},
        {"max_sequences": 4},
        {"max_batch_tokens": 128, "policy": "mlfq"},
        {"kv_memory": 12, "policy": "fcfs", "peak_quantile": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["t5", "marian"])
def test_completions_do_not_depend_on_memory_rows_or_policy(
    name: str,
    memory: Options,
    options: Options,
    folder_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sequences are evicted, moved or dropped and computed again, source and target; beams among them."""
    prompts = [start + prompt for start in ("", "And then: ") for prompt in PROMPTS]
    params = SamplingParams(**options)
    monkeypatch.setattr(Residency, "is_cheaper_to_move", lambda self, s: self._move_seconds(s) < math.inf)
    with load(folder_of(name)) as llm:
        expected = tokens_of(llm.generate(prompts, params))
        block_bytes = llm.model.executable.block_bytes
    blocks = {key: value * block_bytes for key, value in memory.items() if key.startswith("kv_")}
    with load(folder_of(name), **{**memory, **blocks}) as llm:
        assert tokens_of(llm.generate(prompts, params)) == expected
        check_invariants(llm)
        status = llm._engine.status()  # type: ignore[union-attr]
        if "kv_memory" in memory:
            assert status.residency.evictions > 0
        if "kv_spill" in memory:
            assert status.residency.blocks_in > 0


@pytest.mark.parametrize("seed", range(3))
def test_requests_that_come_go_and_wait_at_random_leave_the_others_as_they_are(
    seed: int, folder_of: Callable[[str], Path]
) -> None:
    """Greedy, drawn and searched completions in little memory; blocks and sequences agree after each step."""
    rng = random.Random(seed)
    kinds: list[Options] = [{}, {"temperature": 0.9, "seed": 3, "n": 2}, {"num_beams": 3, "n": 2}]
    with load(folder_of("t5")) as llm:
        block_bytes = llm.model.executable.block_bytes
        alone = {
            (prompt, kind): tokens_of(llm.generate(prompt, SamplingParams(max_tokens=20, **kinds[kind])))
            for prompt in PROMPTS
            for kind in range(3)
        }
    with load(folder_of("t5"), kv_memory=10 * block_bytes, max_sequences=6) as llm:
        engine = llm._engine
        assert engine is not None
        asked: dict[int, tuple[str, int]] = {}
        found: dict[int, dict[int, list[int]]] = {}
        for step in range(400):
            if step < 120 and rng.random() < 0.3:
                prompt, kind = rng.choice(PROMPTS), rng.randrange(3)
                ids = llm.model.tokenizer.encode(prompt)
                request_id = engine.add(ids, SamplingParams(max_tokens=20, **kinds[kind]))
                asked[request_id] = prompt, kind
            for request_id in filter(engine.is_running, list(asked)):
                if rng.random() < 0.01:
                    engine.abort(request_id)
                    del asked[request_id]
                else:
                    engine.hold(request_id, is_held=step < 150 and rng.random() < 0.1)
            for chunk in engine.step():
                if chunk.completion is not None:
                    found.setdefault(chunk.request_id, {})[chunk.index] = list(chunk.completion.token_ids)
            engine.check_invariants()
        assert not engine.has_work
        assert len(asked) > 10
        for request_id, key in asked.items():
            assert [found[request_id][index] for index in sorted(found[request_id])] == alone[key]


SETTINGS: list[Options] = [
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3, "min_length": 12},
    {"min_length": 9},
    {"min_new_tokens": 9},
    {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    {"num_beams": 2, "no_repeat_ngram_size": 2},
    {"renormalize_logits": True, "num_beams": 4, "length_penalty": 0.5},
    {"forced_bos_token_id": 7},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", [pytest.param("t5", marks=pytest.mark.slow), "marian"])
def test_settings_of_a_model_are_honoured_as_by_transformers(
    name: str, settings: Options, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    if "renormalize_logits" in settings and name == "t5":
        pytest.skip("its head has no bias")
    paths = [tmp_path / kind for kind in ("plain", "set")]
    goes_on = not any("min" in key for key in settings)
    for path, own in zip(paths, ({}, settings), strict=True):
        shutil.copytree(folder_of(name), path)
        file = path / "generation_config.json"
        known = json.loads(file.read_text())
        if goes_on:  # these models would end at once
            known |= {"suppress_tokens": [known["eos_token_id"], 4], "forced_eos_token_id": None}
        file.write_text(json.dumps(known | own))
    plain, expected = (expect(path, PROMPTS, max_tokens=20) for path in paths)
    assert plain != expected
    with load(paths[1]) as llm:
        assert tokens_of(llm.generate(PROMPTS, SamplingParams(max_tokens=20))) == expected
        if "num_beams" not in settings:
            beams = llm.generate(PROMPTS, SamplingParams(max_tokens=20, num_beams=3))
            assert tokens_of(beams) == expect(paths[1], PROMPTS, max_tokens=20, num_beams=3)
        check_invariants(llm)


def test_log_probabilities_of_a_search_are_those_among_tokens_that_may_come(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Else this search would find others."""
    found = {}
    for renormalizes in (False, True):
        path = tmp_path / str(renormalizes)
        shutil.copytree(folder_of("marian"), path)
        file = path / "generation_config.json"
        known = json.loads(file.read_text())
        known |= {"suppress_tokens": [known["eos_token_id"], 4, 8], "forced_eos_token_id": None}
        known["renormalize_logits"] = renormalizes
        file.write_text(json.dumps(known))
        with load(path) as llm:
            completions = llm.generate(PROMPTS, SamplingParams(max_tokens=12, num_beams=4, n=4))
        found[renormalizes] = tokens_of(completions)
        assert found[renormalizes] == expect(path, PROMPTS, max_tokens=12, num_beams=4, n=4)
    assert found[False] != found[True]


def test_renormalized_logits_of_a_head_without_bias_are_refused(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(folder_of("t5"), tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"renormalize_logits": True, "suppress_tokens": [7]})
    )
    with pytest.raises(UnsupportedError, match="renormalize_logits=True"):
        load(tmp_path / "model")


def test_sampled_completions_share_their_source(folder_of: Callable[[str], Path]) -> None:
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=7, n=3, repetition_penalty=1.2)
    with load(folder_of("t5")) as llm:
        together = tokens_of(llm.generate(PROMPTS[:2], params))
        alone = [
            tokens_of(llm.generate(prompt, replace(params, n=1, seed=7 + index)))[0]
            for prompt in PROMPTS[:2]
            for index in range(3)
        ]
        assert llm.model.executable.limits.num_blocks > 0
    assert together == alone


def test_repetition_penalties_count_the_target_alone(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("t5, gelu")
    with load(folder) as llm:
        found = llm.generate(PROMPTS, SamplingParams(max_tokens=20, repetition_penalty=1.7))
    assert tokens_of(found) == expect(folder, PROMPTS, max_tokens=20, repetition_penalty=1.7, num_beams=1)


def test_what_marian_must_not_write_and_how_it_must_end(
    folder_of: Callable[[str], Path],
) -> None:
    """The pad token is suppressed and the last token forced, even where tokens are drawn."""
    with load(folder_of("marian")) as llm:
        assert llm.model.target_rules is not None
        assert llm.model.target_rules.suppressed_token_ids == (96,)
        params = SamplingParams(max_tokens=9, temperature=5.0, seed=3, n=20)
        for tokens in tokens_of(llm.generate("The dog", params)):
            assert tokens[-1] == 0
            assert 96 not in tokens
        chunks = list(llm.stream("The dog", SamplingParams(max_tokens=9, num_beams=2)))
        assert [chunk.token_id for chunk in chunks] == list(chunks[-1].completion.token_ids)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_logprobs": 1}, "prompt_logprobs is for decoders"),
        ({"max_tokens": 129}, "max_tokens is 129; the decoder writes 128"),
        ({"num_beams": 11}, "num_beams is 11; the limit of this model is 10"),
    ],
)
def test_what_an_encoder_decoder_does_not_do_is_refused_by_name(
    options: Options, message: str, folder_of: Callable[[str], Path]
) -> None:
    with load(folder_of("t5")) as llm:
        with pytest.raises((OptionError, ContextLengthError), match=message):
            llm.generate("x", SamplingParams(**options))
        with pytest.raises(ContextLengthError, match="the prompt has 129 tokens; the encoder reads 128"):
            llm.generate([list(range(2, 131))])
        with pytest.raises(TemplateError, match="chat template"):
            llm.chat([{"role": "user", "content": "Hello"}])
        with pytest.raises(UnsupportedError, match="no embeddings"):
            llm.embed("x")


def test_speculation_is_refused_before_weights_are_read(folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedError, match="speculation='prompt-lookup'"):
        load(folder_of("t5"), speculation="prompt-lookup")


def test_a_model_without_a_token_to_begin_with_is_refused(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folder_of("t5"), folder)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        settings.pop("decoder_start_token_id")
        (folder / name).write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="decoder_start_token_id"):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoder_start_token_id": "x"}, "decoder_start_token_id is 'x'"),
        ({"decoder_start_token_id": 300}, "token ids are 0 to 299"),
        ({"forced_eos_token_id": [1, 2]}, "forced_eos_token_id"),
        ({"suppress_tokens": 5}, "suppress_tokens is 5, a list"),
        ({"bad_words_ids": {"a": 1}}, "bad_words_ids"),
        ({"bad_words_ids": [["x"]]}, "a suppressed token is 'x'"),
        ({"suppress_tokens": [[1]]}, "a suppressed token is"),
    ],
)
def test_hostile_settings_are_refused_by_name(
    settings: Options, message: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    config = json.loads((folder_of("t5") / "config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        read_target_rules(tmp_path, config, vocab_size=300)


def test_a_constraint_holds_of_a_target(folder_of: Callable[[str], Path]) -> None:
    with load(folder_of("marian")) as llm:
        params = SamplingParams(max_tokens=12, constraint=Choice(("Hund", "Katze")))
        assert {c.text for c in llm.generate(PROMPTS, params)} <= {"Hund", "Katze"}


def test_memory_is_reckoned_with_both_graphs(folder_of: Callable[[str], Path]) -> None:
    for backend in BACKENDS:
        with load(folder_of("t5"), backend=backend) as llm:
            model = llm.model
            expected = model.executable.limits.num_blocks * model.executable.block_bytes
            assert model.footprint.kv_bytes == expected
