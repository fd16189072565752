"""Beam search of a decoder against that of `transformers`, and what becomes of a search that is cut short."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fastserve.engine.beam_search import BeamSearch
from fastserve.engine.llm import LLM
from fastserve.errors import OptionError
from fastserve.evaluate.random_model import make_byte_tokenizer
from fastserve.types import SamplingParams
from tiny_models import LLAMA_CONFIG, random_language_model

VOCAB_SIZE = 300
EOS = 5
PROMPTS = ["The dog", "Once upon a time there was a little girl.", "x"]
ENDLESS: dict[str, Any] = {"num_beams": 4, "length_penalty": 9.0, "early_stopping": "never"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model = random_language_model({**LLAMA_CONFIG, "vocab_size": VOCAB_SIZE, "eos_token_id": EOS})
    model.get_output_embeddings().weight.data[EOS] *= 8  # so that some texts end
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(make_byte_tokenizer(VOCAB_SIZE)))
    return folder


def load(folder: Path, **options: Any) -> LLM:
    return LLM(folder, weights="f32", kv_dtype="f32", context_length=128, **options)


def expect(folder: Path, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for prompt in prompts:
        texts = model.generate(torch.tensor([prompt]), do_sample=False, pad_token_id=0, **options).tolist()
        for tokens in (text[len(prompt) :] for text in texts):
            found.append(tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4},
        {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True, "n": 3},
        {"num_beams": 2, "length_penalty": -0.5, "early_stopping": "never"},
    ],
    ids=str,
)
def test_beams_of_a_decoder_equal_those_of_transformers(options: dict[str, Any], folder: Path) -> None:
    with load(folder) as llm:
        sources = [list(llm.model.tokenizer.encode(prompt)) for prompt in PROMPTS]
        found = llm.generate(PROMPTS, SamplingParams(max_tokens=20, **options))
    options = {**options, "num_return_sequences": options.get("n", 1)}
    options.pop("n", None)
    expected = expect(folder, sources, max_new_tokens=20, **options)
    assert [list(completion.token_ids) for completion in found] == expected
    assert "stop" in {completion.finish_reason for completion in found}
    assert all(completion.service_seconds > 0 for completion in found)


def test_prompts_of_a_chunk_each_and_shared_prefixes_change_no_beam(folder: Path) -> None:
    params = SamplingParams(max_tokens=20, num_beams=4, n=4)
    prompts = [30 * "ab" + prompt for prompt in PROMPTS]
    with load(folder) as llm:
        expected = [list(c.token_ids) for prompt in prompts for c in llm.generate(prompt, params)]
    with load(folder, prefill_chunk_tokens=16, max_sequences=5) as llm:
        for _ in range(2):
            assert [list(c.token_ids) for c in llm.generate(prompts, params)] == expected


def test_a_search_can_be_aborted_at_any_moment(folder: Path) -> None:
    with load(folder) as llm:
        engine = llm._engine
        assert engine is not None
        for num_steps in range(8):
            request_id = engine.add([1, 2, 3], SamplingParams(max_tokens=20, n=2, **ENDLESS))
            for _ in range(num_steps):
                assert not engine.step()
            assert (engine.abort(request_id) > 0) == (num_steps > 0)
            engine.check_invariants()
            assert not engine.has_work


def test_a_search_whose_time_is_over_ends_with_all_its_completions(folder: Path) -> None:
    with load(folder) as llm:
        engine = llm._engine
        assert engine is not None
        engine.add([1, 2, 3], SamplingParams(max_tokens=100, n=3, **ENDLESS), timeout_ms=10_000)
        chunks = [chunk for _ in range(5) for chunk in engine.step()]
        assert not chunks
        engine._admission._times = [(0.0, 0, "deadline")]
        chunks = engine.step()
        assert [chunk.index for chunk in chunks] == [0, 1, 2]
        assert all(chunk.completion is not None and chunk.completion.has_expired for chunk in chunks)
        engine.check_invariants()
        assert not engine.has_work


def test_a_search_whose_step_fails_ends_with_all_its_completions(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(folder) as llm:
        engine = llm._engine
        assert engine is not None
        engine.add([1, 2, 3], SamplingParams(max_tokens=100, n=3, **ENDLESS))
        for _ in range(5):
            assert not engine.step()

        def fail(batch: object) -> None:
            raise RuntimeError("broken")

        monkeypatch.setattr(engine._executable, "run", fail)
        chunks = engine.step()
        assert [chunk.completion.error for chunk in chunks if chunk.completion] == [  # type: ignore[misc]
            "its step failed: RuntimeError: broken"
        ] * 3
        engine.check_invariants()
        assert not engine.has_work


def test_a_reader_who_is_behind_holds_all_beams(folder: Path) -> None:
    with load(folder) as llm:
        engine = llm._engine
        assert engine is not None
        request_id = engine.add([1, 2, 3], SamplingParams(max_tokens=12, **ENDLESS))
        for _ in range(3):
            engine.step()
        engine.hold(request_id)
        engine.step()
        assert engine.is_waiting
        engine.hold(request_id, is_held=False)
        chunks = [chunk for _ in range(20) for chunk in engine.step()]
        assert chunks[-1].completion is not None
        assert chunks[-1].completion.token_ids == tuple(chunk.token_id for chunk in chunks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 2, "temperature": 0.5}, "temperature has no part in beam search"),
        ({"num_beams": 2, "stop": "x"}, "stop has no part in beam search"),
        ({"num_beams": 2, "logprobs": 1}, "logprobs has no part in beam search"),
        ({"num_beams": 2, "n": 3}, "n is 3, and num_beams 2"),
        ({"num_beams": 1, "length_penalty": 2.0}, "length_penalty=2.0 is for beam search"),
        ({"num_beams": 1, "early_stopping": True}, "early_stopping=True is for beam search"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping is 'soon'"),
        ({"num_beams": 2, "early_stopping": 1}, "early_stopping is 1"),
        ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SamplingParams(**options)


def test_options_of_a_search_are_refused_where_the_model_has_none_of_its_own(folder: Path) -> None:
    with load(folder) as llm, pytest.raises(OptionError, match=r"length_penalty=2\.0 is for beam search"):
        llm.generate("x", SamplingParams(length_penalty=2.0))


def test_speculation_and_beams_do_not_go_together(folder: Path) -> None:
    with load(folder, speculation="prompt-lookup") as llm, pytest.raises(OptionError, match="speculation"):
        llm.generate("x", SamplingParams(num_beams=2))


def test_of_equal_beams_the_earlier_goes_on() -> None:
    search = BeamSearch(2, eos_token_ids={0}, max_tokens=5)
    assert search.advance([[(3, -1.0), (4, -1.0), (5, -1.0), (6, -2.0)]]) == [(0, 3), (0, 4)]
    assert search.advance([[(7, -1.0), (8, -3.0)], [(9, -1.0), (1, -2.0)]]) == [(0, 7), (1, 9)]
