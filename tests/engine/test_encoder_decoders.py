"""Encoder-decoders through the engine: greedy completions and beams are those of `transformers`, alone and
batched, whatever is evicted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from encoder_decoder_configs import ENCODER_DECODERS
from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.engine.completion import Completion
from fastserve.engine.llm import LLM
from fastserve.evaluate.random_model import make_byte_tokenizer
from fastserve.types import SamplingParams
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
    engine.check_invariants()
    assert not engine.has_work
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
