"""Decoder families through the engine: what holds of Llama's completions holds of windows, learned positions,
norms of heads and fused matrices too.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from decoder_configs import DECODERS
from fastserve.config import EngineOptions
from fastserve.engine.llm import LLM
from fastserve.engine.load import plan_model
from fastserve.evaluate.random_model import make_byte_tokenizer
from fastserve.types import SamplingParams
from tiny_models import random_language_model

VOCAB_SIZE = 300
FAMILIES = [
    "mistral, window",
    "qwen2, tied, windows",
    "qwen3, biases, windows by layer",
    "gemma2",
    "gemma3",
    "phi3, window, partial rotary",
    "smollm3, windows",
    "mixtral",
    "qwen2_moe",
    "gpt2",
    "gpt_neox",
    "opt",
]
PREFIX = "Once upon a time there was a little girl who lived in a village near the forest. "
PROMPTS = [PREFIX + "One day", PREFIX + "Her mother", "The dog", "ab" * 40, PREFIX * 2]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def save(name: str) -> Path:
        folder = tmp_path_factory.mktemp("model")
        random_language_model({**DECODERS[name], "vocab_size": VOCAB_SIZE}).save_pretrained(folder)
        (folder / "tokenizer.json").write_text(json.dumps(make_byte_tokenizer(VOCAB_SIZE)))
        return folder

    return save


def params_of(index: int) -> SamplingParams:
    """Greedy, or seeded."""
    seeded = {"temperature": 0.8, "seed": index} if index % 2 else {}
    return SamplingParams(max_tokens=40, **seeded)  # type: ignore[arg-type]


def tokens_alone(folder: Path) -> list[tuple[int, ...]]:
    """Each prompt in an engine of its own, which knows no prefix."""
    tokens = []
    for index, prompt in enumerate(PROMPTS):
        with LLM(folder, threads=1) as llm:
            tokens.append(llm.generate(prompt, params_of(index))[0].token_ids)
    return tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_the_same_alone_and_batched_chunked_drafted_and_from_known_prefixes(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    pytest.importorskip("fastserve._native")
    folder = folder_of(name)
    alone = tokens_alone(folder)
    params = [params_of(index) for index in range(len(PROMPTS))]
    for options in (
        {"threads": 2},
        {"prefill_chunk_tokens": 7, "max_sequences": 2},
        {"speculation": "prompt-lookup"},
        {"speculation": "draft", "draft_layers": 1},
    ):
        with LLM(folder, **options) as llm:
            for _ in range(2):  # the second time, prompts are known
                together = [completion.token_ids for completion in llm.generate(PROMPTS, params)]
                assert together == alone, options


def test_a_completion_ends_at_any_token_that_generation_config_names(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("fastserve._native")
    folder = folder_of("gemma3")
    with LLM(folder) as llm:
        token_ids = llm.generate(PROMPTS[0], SamplingParams(max_tokens=20, ignore_eos=True))[0].token_ids
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, token_ids[4]]}))
    with LLM(tmp_path) as llm:
        completion = llm.generate(PROMPTS[0], SamplingParams(max_tokens=20))[0]
    assert completion.finish_reason == "stop"
    assert completion.token_ids == token_ids[: token_ids.index(token_ids[4]) + 1]


def test_longrope_serves_short_texts_unless_long_ones_are_asked_for(
    folder_of: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("fastserve._native")
    folder = folder_of("phi3, longrope")
    assert plan_model(folder, EngineOptions()).context_length == 256
    with caplog.at_level(logging.WARNING), LLM(folder) as llm:
        short = llm.generate(PROMPTS[2], SamplingParams(max_tokens=40))[0].token_ids
    assert "rotary factors" not in caplog.text
    with caplog.at_level(logging.WARNING), LLM(folder, context_length=257) as llm:
        long = llm.generate(PROMPTS[2], SamplingParams(max_tokens=40))[0].token_ids
    assert "rotary factors for those of more than 256 tokens" in caplog.text
    assert long != short
