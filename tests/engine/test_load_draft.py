"""A draft model is opened as the model is, beside it, where their vocabularies are the same."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from encoder_decoder_configs import T5
from fastserve.cli.main import main
from fastserve.config import EngineOptions
from fastserve.engine import load
from fastserve.engine.async_llm import AsyncLLM
from fastserve.engine.llm import LLM
from fastserve.errors import MemoryLimitError, OptionError, UnsupportedError
from fastserve.evaluate.model_folder import write_model_folder
from fastserve.evaluate.random_model import make_byte_tokenizer
from fastserve.models.family import build_graph, read_config
from fastserve.models.parameters import expected_parameters
from fastserve.types import SamplingParams
from tiny_models import random_encoder_decoder

pytest.importorskip("fastserve._native")

PROMPT = "Once upon a time"
PARAMS = SamplingParams(max_tokens=100)


def write_draft(stories: Path, folder: Path, **changes: object) -> Path:
    """A random model of the vocabulary of another, and smaller."""
    config = json.loads((stories / "config.json").read_text()) | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **changes,
    }
    shapes = expected_parameters(build_graph(read_config(config)))
    rng = np.random.default_rng(1)
    write_model_folder(
        folder,
        config,
        (stories / "tokenizer.json").read_text(),
        shapes,
        lambda name: [rng.standard_normal(shapes[name]).astype(np.float32) / 8],
    )
    return folder


def test_a_random_draft_changes_nothing_and_is_given_up(stories: Path, tmp_path: Path) -> None:
    with LLM(stories) as llm:
        expected = llm.generate(PROMPT, PARAMS)[0].token_ids
    with LLM(stories, speculation="draft", draft_model=write_draft(stories, tmp_path / "d")) as llm:
        drafted = []
        for _ in range(12):
            assert llm.generate(PROMPT, PARAMS)[0].token_ids == expected
            drafted.append(llm._engine.status().speculation.drafted_tokens)
        accepted = llm._engine.status().speculation.accepted_tokens
    assert drafted[0] > 0
    assert drafted[-1] - drafted[-5] < 20  # of 400 tokens
    assert accepted < 0.2 * drafted[-1]


def test_the_same_model_from_another_file_is_mostly_right(stories: Path) -> None:
    """Their weights differ by what the formats round."""
    with LLM(stories) as llm:
        expected = llm.generate(PROMPT, PARAMS)[0].token_ids
    draft = stories / "stories260K.gguf"
    with LLM(stories, speculation="draft", draft_model=draft, draft_weights="f32") as llm:
        assert llm.generate(PROMPT, PARAMS)[0].token_ids == expected
        counters = llm._engine.status().speculation
    assert counters.accepted_tokens > 0.7 * counters.drafted_tokens > 0


@pytest.mark.parametrize("changes", [{"vocab_size": 500}, {}], ids=["size", "tokens"])
def test_a_draft_of_another_vocabulary_is_refused_before_weights_are_read(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, int]
) -> None:
    draft = write_draft(stories, tmp_path / "d", **changes)
    if not changes:
        path = draft / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        vocabulary = tokenizer["model"]["vocab"]
        first, second = (token for token, token_id in vocabulary.items() if token_id in (400, 401))
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        path.write_text(json.dumps(tokenizer))
    monkeypatch.setattr(load, "_compile", lambda *args, **options: pytest.fail("weights were read"))
    with pytest.raises(UnsupportedError, match=r"another vocabulary: .* the model"):
        LLM(stories, speculation="draft", draft_model=draft)


def test_an_encoder_decoder_is_no_draft(stories: Path, tmp_path: Path) -> None:
    random_encoder_decoder({**T5, "vocab_size": 300}).save_pretrained(tmp_path / "t5")
    (tmp_path / "t5" / "tokenizer.json").write_text(json.dumps(make_byte_tokenizer(300)))
    with pytest.raises(UnsupportedError, match="is an encoder-decoder, which cannot guess"):
        LLM(stories, speculation="draft", draft_model=tmp_path / "t5")


def test_layers_that_a_draft_has_not_are_refused_with_both_numbers(stories: Path) -> None:
    with pytest.raises(OptionError, match=r"draft_layers is 6; the model .* has 5"):
        LLM(stories, speculation="draft", draft_layers=6)


def test_a_draft_has_a_fourth_of_the_kv_memory_or_what_is_said(stories: Path) -> None:
    options = EngineOptions(speculation="draft", draft_layers=2, kv_memory="1MiB")
    model = load.load_model(stories, options)
    assert model.draft is not None
    block_bytes = model.draft.executable.block_bytes
    fourth = model.footprint.kv_bytes // 4
    assert fourth - block_bytes < model.draft.footprint.kv_bytes <= fourth
    model = load.load_model(stories, replace(options, draft_kv_memory=3 * block_bytes))
    assert model.draft is not None
    assert model.draft.executable.limits.num_blocks == 3


def test_a_draft_that_does_not_fit_beside_the_model_is_refused(
    stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = EngineOptions(speculation="draft", draft_layers=4, kv_memory="8MiB")
    alone = load.load_model(stories, EngineOptions(kv_memory="8MiB")).footprint
    monkeypatch.setattr(load, "available_memory_bytes", lambda: alone.total_bytes + 2**20)
    with pytest.raises(MemoryLimitError, match="of the draft model: the model needs"):
        load.load_model(stories, options)


def test_an_async_model_has_its_draft_too(stories: Path) -> None:
    async def tokens(options: EngineOptions) -> tuple[tuple[int, ...], int]:
        async with AsyncLLM(stories, options) as llm:
            (completion,) = await llm.generate(PROMPT, PARAMS)
            return completion.token_ids, (await llm.status()).speculation.accepted_tokens

    plain, _ = asyncio.run(tokens(EngineOptions()))
    drafted, num_accepted = asyncio.run(tokens(EngineOptions(speculation="draft", draft_weights="f32")))
    assert drafted == plain
    assert num_accepted > 0


def test_a_draft_is_reached_from_the_command_line(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(stories), PROMPT, "--max-tokens", "40", "--json"]
    texts = []
    draft = str(write_draft(stories, tmp_path / "d"))
    for more in ([], ["--speculation", "draft", "--draft-model", draft, "--max-draft-tokens", "3"]):
        assert main([*command, *more]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1]
