from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from fastserve.config import EngineOptions, KvDtype
from fastserve.engine import blueprint, load
from fastserve.engine.completion import Completion
from fastserve.engine.llm import LLM
from fastserve.engine.sequence import Sequence
from fastserve.errors import (
    ContextLengthError,
    DeadlineError,
    FastServeError,
    MemoryLimitError,
    OptionError,
    StepError,
    TemplateError,
    UnsupportedError,
)
from fastserve.models.task import Task
from fastserve.types import SamplingParams

PROMPT = "Once upon a time"


@pytest.fixture
def llm(stories: Path) -> Iterator[LLM]:
    with LLM(stories, weights="f32", kv_dtype="f32") as llm:
        yield llm
        assert_nothing_is_held(llm)


def assert_nothing_is_held(llm: LLM) -> None:
    assert llm._engine is not None
    llm._engine.check_invariants()
    assert not llm._engine.has_work
    assert llm._engine.pool.num_free == llm._engine.pool.num_blocks
    assert not llm._inboxes


def test_greedy_tokens_are_those_that_transformers_gave(stories: Path, backend: str) -> None:
    golden = json.loads((stories / "golden.json").read_text())["stories260K"]
    prompt_ids, expected = golden["prompt_ids"], golden["greedy_64"]
    with LLM(stories, weights="f32", kv_dtype="f32", backend=backend) as llm:
        (completion,) = llm.generate(prompt_ids, SamplingParams(max_tokens=64))
    assert [*prompt_ids, *completion.token_ids] == expected


def test_a_completion_says_all_about_itself(llm: LLM) -> None:
    (completion,) = llm.generate(PROMPT, SamplingParams(max_tokens=12, seed=5, temperature=0.5, logprobs=3))
    assert completion.text.startswith(", there was a")
    assert completion.finish_reason == "length"
    assert (completion.prompt_tokens, completion.completion_tokens, completion.seed) == (5, 12, 5)
    assert completion.time_to_first_token_seconds > 0
    assert completion.decode_tokens_per_second is not None
    assert completion.logprobs is not None
    for entry in completion.logprobs:
        assert [logprob for _, logprob in entry.top] == sorted((p for _, p in entry.top), reverse=True)
        assert len(entry.top) == 3
        assert entry.logprob <= entry.top[0][1] <= 0


def test_prompts_may_be_a_text_token_ids_or_many_of_both(llm: LLM) -> None:
    params = SamplingParams(max_tokens=5)
    ids = llm.model.tokenizer.encode(PROMPT)
    by_text, by_ids = llm.generate(PROMPT, params), llm.generate(ids, params)
    many = llm.generate([PROMPT, ids, "The dog"], params)
    assert by_text[0].token_ids == by_ids[0].token_ids == many[0].token_ids == many[1].token_ids
    assert len(by_text) == len(by_ids) == 1
    assert len(many) == 3


def test_each_prompt_may_have_its_own_params(llm: LLM) -> None:
    completions = llm.generate([PROMPT] * 2, [SamplingParams(max_tokens=3), SamplingParams(max_tokens=7)])
    assert [completion.completion_tokens for completion in completions] == [3, 7]
    with pytest.raises(OptionError, match="1 params for 2 prompts"):
        llm.generate([PROMPT] * 2, [SamplingParams()])


@pytest.mark.parametrize("prompts", [[], [PROMPT, []]])
def test_without_a_prompt_nothing_runs(llm: LLM, prompts: list[object]) -> None:
    with pytest.raises(OptionError, match=r"no prompts|no tokens"):
        llm.generate(prompts, SamplingParams(max_tokens=1))


@pytest.mark.parametrize("stop", [(), (" little girl", "nobody"), (".",)])
def test_streamed_texts_join_to_the_text_of_generate(llm: LLM, stop: tuple[str, ...]) -> None:
    params = SamplingParams(max_tokens=40, stop=stop)
    chunks = list(llm.stream(PROMPT, params))
    (whole,) = llm.generate(PROMPT, params)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tuple(chunk.token_id for chunk in chunks) == whole.token_ids
    assert [chunk.completion is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].completion is not None
    assert chunks[-1].completion.text == whole.text
    assert not any(text in whole.text for text in stop)


def test_the_text_goes_on_where_the_prompt_ends(llm: LLM) -> None:
    ids = llm.generate(PROMPT, SamplingParams(max_tokens=30))[0].token_ids
    prompt_ids = llm.model.tokenizer.encode(PROMPT)
    for length in range(1, 29):
        completion = llm.generate([[*prompt_ids, *ids[:length]]], SamplingParams(max_tokens=1))[0]
        whole = llm.model.tokenizer.decode([*prompt_ids, *ids[:length], *completion.token_ids])
        assert whole == llm.model.tokenizer.decode([*prompt_ids, *ids[:length]]) + completion.text


def test_closing_a_stream_at_any_moment_frees_all_that_it_held(llm: LLM) -> None:
    for num_chunks in range(4):
        stream = llm.stream(PROMPT, SamplingParams(max_tokens=50))
        for _ in range(num_chunks):
            next(stream)
        stream.close()
        assert_nothing_is_held(llm)


def test_a_stream_that_is_dropped_frees_all_that_it_held(llm: LLM) -> None:
    stream = llm.stream(PROMPT, SamplingParams(max_tokens=50))
    next(stream)
    del stream
    assert_nothing_is_held(llm)


def test_streams_that_are_open_together_get_their_own_tokens(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20)
    prompts = [PROMPT, "The dog", "One day"]
    together = list(zip(*(llm.stream(prompt, params) for prompt in prompts), strict=True))
    alone = [completion.token_ids for completion in llm.generate(prompts, params)]
    assert [tuple(chunk.token_id for chunk in chunks) for chunks in zip(*together, strict=True)] == alone


def test_a_call_with_one_bad_prompt_runs_nothing_and_holds_nothing(llm: LLM) -> None:
    with pytest.raises(ContextLengthError, match="the context is 512 tokens"):
        llm.generate([PROMPT, [1] * 512])
    assert_nothing_is_held(llm)


def test_after_a_failed_step_the_model_goes_on(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(batch: object) -> None:
        raise RuntimeError("kernel")

    with monkeypatch.context() as patch:
        patch.setattr(type(llm.model.executable), "run", lambda self, batch: fail(batch))
        for completion in llm.generate([PROMPT, "The dog"], SamplingParams(max_tokens=4)):
            with pytest.raises(StepError, match="after 0 tokens its step failed: RuntimeError: kernel"):
                completion.checked()
    assert_nothing_is_held(llm)
    assert llm.generate(PROMPT, SamplingParams(max_tokens=4))[0].completion_tokens == 4


def test_without_max_tokens_a_completion_may_fill_the_context(stories: Path) -> None:
    with LLM(stories, context_length=48) as llm:
        (completion,) = llm.generate(PROMPT, SamplingParams(ignore_eos=True))
    assert completion.prompt_tokens + completion.completion_tokens == 48


def test_a_context_beyond_the_models_own_is_refused_with_both_numbers(stories: Path) -> None:
    with pytest.raises(ContextLengthError, match="context_length is 513; the model was made for 512"):
        LLM(stories, context_length=513)


def test_too_little_memory_is_told_before_weights_are_read(
    stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blueprint, "available_memory_bytes", lambda: 10 * 2**20)
    monkeypatch.setattr(blueprint, "_compile", lambda *args, **options: pytest.fail("weights were read"))
    with pytest.raises(MemoryLimitError, match=r"needs \d+ MiB of memory .* 10 MiB are available"):
        LLM(stories)


@pytest.mark.parametrize("kv_dtype", get_args(KvDtype))
def test_kv_memory_is_exact_to_the_block(stories: Path, backend: str, kv_dtype: KvDtype) -> None:
    for kv_memory in (2_000_003, 2**22):
        options = EngineOptions(kv_memory=kv_memory, kv_dtype=kv_dtype, backend=backend)
        model = load.load_model(stories, options)
        executable = model.executable
        pool_bytes = executable.limits.num_blocks * executable.block_bytes
        assert kv_memory - executable.block_bytes < pool_bytes <= kv_memory
        assert model.footprint.kv_bytes == pool_bytes


def test_kv_memory_that_does_not_hold_a_block_is_refused_and_the_hint_is_right(stories: Path) -> None:
    with pytest.raises(MemoryLimitError, match="kv_memory holds 0 blocks of 32 tokens") as raised:
        LLM(stories, kv_memory=1)
    needed = int(str(raised.value.hint).split("kv_memory=")[1].split()[0])
    with LLM(stories, kv_memory=needed) as llm:
        assert llm.model.footprint.kv_bytes == llm.model.executable.block_bytes == needed
        assert llm.generate(PROMPT, SamplingParams(max_tokens=4))[0].completion_tokens == 4


def test_a_closed_model_refuses_work_and_its_streams_end_with_an_error(stories: Path) -> None:
    llm = LLM(stories)
    stream = llm.stream(PROMPT)
    next(stream)
    llm.close()
    llm.close()
    with pytest.raises(OptionError, match="closed"):
        next(stream)
    with pytest.raises(OptionError, match="closed"):
        llm.generate(PROMPT)


def test_the_arguments_of_llm_are_the_engines_options_with_their_defaults() -> None:
    arguments = inspect.signature(LLM).parameters
    options = {f.name: f.default for f in fields(EngineOptions)}
    assert {name: arguments[name].default for name in options} == options
    assert set(arguments) == {"model", "offline", "name", "task", "length_predictor", *options}


def test_a_model_without_a_chat_template_does_not_chat(llm: LLM) -> None:
    with pytest.raises(TemplateError, match="no chat template"):
        llm.chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("act", ["generate", "chat"])
def test_a_prompt_that_is_certain_not_to_fit_is_refused_without_encoding_it(
    model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    text = "word " * 10_000
    with LLM(model_dir("smollm2-135m-instruct"), context_length=512) as llm:
        monkeypatch.setattr(llm.model.tokenizer, "encode", lambda *_, **options: pytest.fail("encoded"))
        with pytest.raises(ContextLengthError, match=r"at least \d+ tokens; the context is 512 tokens"):
            llm.generate(text) if act == "generate" else llm.chat([{"role": "user", "content": text}])


@pytest.mark.parametrize("task", ["generate", "embed"])
def test_a_model_that_is_not_made_for_the_task_is_refused_by_name_before_weights_are_read(
    model_dir: Callable[[str], Path], stories: Path, monkeypatch: pytest.MonkeyPatch, task: Task
) -> None:
    path = model_dir("all-minilm-l6-v2") if task == "generate" else stories
    monkeypatch.setattr(blueprint, "_compile", lambda *args, **options: pytest.fail("weights were read"))
    with pytest.raises(UnsupportedError, match="the model 'my-model' "):
        LLM(path, name="my-model", task=task)


def test_a_text_generator_has_no_embeddings(llm: LLM) -> None:
    with pytest.raises(UnsupportedError, match="no embeddings"):
        llm.embed("Hi")


def test_a_chat_model_answers_and_streams_the_same_answer(model_dir: Callable[[str], Path]) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    params = SamplingParams(max_tokens=32)
    # int8 may flip the first token, a near-tie in float32.
    with LLM(model_dir("smollm2-135m-instruct"), weights="bf16") as llm:
        answer = llm.chat(messages, params)
        streamed = "".join(chunk.text for chunk in llm.stream_chat(messages, params))
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
    assert streamed == answer.text


def test_a_chat_template_reads_the_tools_and_variables_that_it_is_given(
    stories: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(stories, model)
    template = "{% for t in tools or () %}{{ t.name }} {% endfor %}{{ mood }}{{ messages[0].content }}"
    (model / "chat_template.jinja").write_text(template)
    messages, params = [{"role": "user", "content": "Hi"}], SamplingParams(max_tokens=3)
    given = {"tools": [{"name": "look"}], "variables": {"mood": "sad "}}
    with LLM(model, weights="f32") as llm:
        expected = llm.generate([llm.model.tokenizer.encode("look sad Hi", add_special_tokens=False)], params)
        assert llm.chat(messages, params, **given).token_ids == expected[0].token_ids
        assert llm.chat(messages, params, **given).prompt_tokens == expected[0].prompt_tokens
        streamed = [chunk.token_id for chunk in llm.stream_chat(messages, params, **given)]
        assert streamed == list(expected[0].token_ids)
        assert len(llm.chat_prompt(messages)) < expected[0].prompt_tokens


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(stories: Path, device: str) -> None:
    pytest.importorskip("torch")
    with pytest.raises(OptionError, match=f"device='{device}' does not work"):
        LLM(stories, backend="torch", device=device)


@pytest.fixture(scope="module")
def encoder(model_dir: Callable[[str], Path]) -> Iterator[LLM]:
    with LLM(model_dir("all-minilm-l6-v2"), max_batch_tokens=64, max_sequences=4) as llm:
        yield llm


def test_embeddings_of_like_texts_are_near_and_have_length_one(encoder: LLM) -> None:
    cat, kitten, stock = encoder.embed(["A cat sleeps.", "A kitten is sleeping.", "Stocks fell."])
    np.testing.assert_allclose(np.linalg.norm([cat, kitten, stock], axis=1), 1, rtol=1e-5)
    assert cat @ kitten > 0.7 > 0.3 > cat @ stock


def test_an_embedding_is_the_same_alone_and_in_any_batch(encoder: LLM) -> None:
    texts = [f"{'word ' * (i * 7 % 40)}number {i}" for i in range(12)]
    together = encoder.embed(texts)
    assert together.dtype == np.float32
    assert together.tolist() == [encoder.embed(text)[0].tolist() for text in texts]


def test_a_text_beyond_the_models_limit_is_refused_or_cut_where_asked(encoder: LLM) -> None:
    long = "hello " * 300
    with pytest.raises(ContextLengthError, match="at least 300 tokens; the model embeds at most 256"):
        encoder.embed(["short", long])
    with pytest.raises(ContextLengthError, match="a text has 302 tokens"):
        encoder.embed(f"{'hello,' * 150}")
    np.testing.assert_array_equal(encoder.embed(long, truncate=True), encoder.embed("hello " * 254))


def test_an_encoder_neither_generates_nor_embeds_nothing(encoder: LLM) -> None:
    with pytest.raises(UnsupportedError, match="does not generate text"):
        encoder.generate("Hi")
    with pytest.raises(OptionError, match="no texts"):
        encoder.embed([])


def test_auto_weights_are_int8_for_text_and_f32_for_encoders(stories: Path, encoder: LLM) -> None:
    assert encoder.model.weights == "f32"
    with LLM(stories) as llm:
        assert llm.model.weights == "int8"


class Listener:
    """A predictor that takes down whom it is asked about."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def kind(self, sequence: Sequence) -> str:
        self.asked.append((sequence.tenant, sequence.endpoint))
        return str(sequence.num_prompt_tokens)


def test_a_length_predictor_is_asked_once_about_every_request_and_knows_where_it_came_by(stories) -> None:
    predictor = Listener()
    with LLM(stories, threads=1, length_predictor=predictor) as llm:
        params = SamplingParams(max_tokens=2)
        llm.generate(["He", "The dog"], params, tenant=["a", "b"], endpoint="batch")
        list(llm.stream("He", params, tenant="a", endpoint="live"))
        llm.generate("He", params)
        assert predictor.asked == [("a", "batch"), ("b", "batch"), ("a", "live"), ("", "")]
        with pytest.raises(OptionError, match="endpoint=3 is not a name"):
            llm.generate("He", params, endpoint=3)  # type: ignore[arg-type]


def test_prompts_of_several_tenants_and_a_deadline_of_all(stories: Path) -> None:
    with LLM(stories, threads=1, tenant_weights={"a": 1.0, "b": 3.0}, unknown_tenants="refuse") as llm:
        params = SamplingParams(max_tokens=8)
        both = llm.generate(["He", "The dog"], params, tenant=["a", "b"], priority_class="batch", session="s")
        assert [c.token_ids for c in both] == [
            llm.generate(prompt, params, tenant="b")[0].token_ids for prompt in ("He", "The dog")
        ]
        with pytest.raises(OptionError, match="there are 1 tenants for 2 prompts"):
            llm.generate(["He", "The dog"], params, tenant=["a"])
        with pytest.raises(OptionError, match="tenant 'c' is unknown"):
            llm.generate(["He", "The dog"], params, tenant=["a", "c"])
        endless = SamplingParams(max_tokens=400, ignore_eos=True)
        try:
            (completion,) = llm.generate("He", endless, tenant="a", timeout_ms=1)
            error: FastServeError | None = None if completion.error is None else completion_error(completion)
        except DeadlineError as refusal:
            error = refusal
        assert isinstance(error, DeadlineError)
        last = list(llm.stream("He", endless, tenant="b", timeout_ms=10_000_000))[-1].completion
        assert last is not None
        assert last.checked().completion_tokens == 400


def completion_error(completion: Completion) -> FastServeError:
    with pytest.raises(FastServeError) as caught:
        completion.checked()
    return caught.value


def test_logprobs_of_a_prompt_are_those_that_its_tokens_had_when_they_were_chosen(stories) -> None:
    with LLM(stories, threads=1) as llm:
        (whole,) = llm.generate(
            "Once upon a time", SamplingParams(max_tokens=80, logprobs=3, ignore_eos=True)
        )
        assert whole.logprobs is not None
        prompt = [*llm.model.tokenizer.encode("Once upon a time"), *whole.token_ids]
        params = SamplingParams(max_tokens=1, prompt_logprobs=3)
        (alone,) = llm.generate([prompt], params)
        assert alone.prompt_logprobs is not None
        assert len(alone.prompt_logprobs) == len(prompt) - 1
        assert alone.prompt_logprobs[-80:] == whole.logprobs
        beside = llm.generate([prompt, prompt, "The dog"], [params, params, SamplingParams(max_tokens=60)])
        assert [c.prompt_logprobs for c in beside] == [alone.prompt_logprobs, alone.prompt_logprobs, None]
