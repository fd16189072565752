"""A request has the same tokens alone and in any batch, at any chunk size, with any number of threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from eviction import evict_again_and_again

from fastserve.engine.cost import OnlineStepCost, StepCost, StepWork
from fastserve.engine.draft_guesser import DraftGuesser
from fastserve.engine.guesser import Account
from fastserve.engine.llm import LLM
from fastserve.engine.lookup_guesser import LookupGuesser
from fastserve.engine.verification_cost import VerificationCost
from fastserve.types import SamplingParams

PROMPTS = [
    "Once upon a time",
    "The dog",
    "Lily and Tom went to the park. They saw a big tree and a little bird that could not fly. " * 3,
    "One day, a cat",
    "He",
    "Mom said: do not open the box! But Sam was curious, and when nobody looked, he opened it and saw",
]


DRAFTED = {"speculation": "draft", "draft_weights": "int4"}


def params_of(index: int) -> SamplingParams:
    """Greedy and seeded requests of different lengths; each filter and penalty is on in some of them."""
    if index % 2 == 0:
        return SamplingParams(max_tokens=8 + 5 * index)
    penalty = 1.2 if index % 3 == 0 else 1.0
    return SamplingParams(
        max_tokens=8 + 5 * index,
        temperature=0.9,
        top_p=0.95,
        top_k=40 * (index % 4),
        seed=index,
        repetition_penalty=penalty,
    )


def tokens_together(model: Path, **options: object) -> list[tuple[int, ...]]:
    params = [params_of(index) for index in range(len(PROMPTS))]
    with LLM(model, **options) as llm:
        return [completion.token_ids for completion in llm.generate(PROMPTS, params)]


def tokens_alone(model: Path, **options: object) -> list[tuple[int, ...]]:
    with LLM(model, **options) as llm:
        return [llm.generate(prompt, params_of(index))[0].token_ids for index, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def alone(stories: Path) -> Callable[[str, str], list[tuple[int, ...]]]:
    """The tokens of every prompt by itself on one thread, by the formats of weights and KV."""
    return cache(lambda weights, kv: tokens_alone(stories, weights=weights, kv_dtype=kv, threads=1))


@pytest.fixture(scope="module")
def real_alone(model_dir: Callable[[str], Path]) -> list[tuple[int, ...]]:
    pytest.importorskip("fastserve._native")
    return tokens_alone(model_dir("smollm2-135m-instruct"))


@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "int8"])
@pytest.mark.parametrize("weights", ["f32", "bf16", "int8", "int4"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threads": 3},
        {"max_sequences": 2},
        {"max_batch_tokens": 6, "threads": 2},
        *({"prefill_chunk_tokens": n} for n in (1, 2, 15, 16, 17, 33)),
    ],
    ids=str,
)
def test_tokens_are_the_same_alone_and_in_any_batch(stories, alone, weights, kv_dtype, options) -> None:
    pytest.importorskip("fastserve._native")
    together = tokens_together(stories, weights=weights, kv_dtype=kv_dtype, **options)
    assert together == alone(weights, kv_dtype)


def test_greedy_tokens_of_the_torch_backend_do_not_depend_on_the_batch(stories) -> None:
    """Its matrix products may differ in the last bits from batch to batch, so nothing is drawn here."""
    pytest.importorskip("torch")
    params = SamplingParams(max_tokens=8)
    with LLM(stories, backend="torch", prefill_chunk_tokens=5) as llm:
        together = [completion.token_ids for completion in llm.generate(PROMPTS[:4], params)]
        assert together == [llm.generate(prompt, params)[0].token_ids for prompt in PROMPTS[:4]]


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 1},
        {"threads": 3},
        *({"prefill_chunk_tokens": n} for n in (1, 7, 33)),
        {"max_batch_tokens": 33},
    ],
    ids=str,
)
def test_tokens_of_the_real_model_are_the_same_alone_and_in_any_batch(model_dir, real_alone, options) -> None:
    assert tokens_together(model_dir("smollm2-135m-instruct"), **options) == real_alone


@pytest.mark.parametrize("kv_spill", [None, "8MiB"])
@pytest.mark.parametrize(
    "policy", ["boost", "gittins", "fcfs", "mlfq", "mlfq-published:starvation_seconds=0.01"]
)
@pytest.mark.parametrize("kv_dtype", ["f16", "int8"])
def test_tokens_are_the_same_preempted_moved_and_computed_again(
    stories, alone, policy, kv_dtype, kv_spill
) -> None:
    """In memory for about a third of the prompts."""
    pytest.importorskip("fastserve._native")
    block_bytes = {"f16": 2 * 5 * 4 * 32 * 16 * 2, "int8": 2 * 5 * 4 * 32 * (16 + 4)}[kv_dtype]
    options = {"kv_memory": 6 * block_bytes, "kv_spill": kv_spill, "policy": policy, "kv_dtype": kv_dtype}
    params = [params_of(index) for index in range(len(PROMPTS))]
    with LLM(stories, weights="int8", context_length=256, max_batch_tokens=64, **options) as llm:
        evict_again_and_again(llm)
        together = [completion.token_ids for completion in llm.generate(PROMPTS, params)]
        again = [completion.token_ids for completion in llm.generate(PROMPTS, params)]  # prefixes are known
        counters = llm._engine.scheduler.residency.counters
    assert together == again == alone("int8", kv_dtype)
    assert counters.evictions > 10


@pytest.mark.parametrize("kv_spill", [None, "64MiB"])
def test_tokens_of_the_real_model_are_the_same_preempted_and_moved(model_dir, real_alone, kv_spill) -> None:
    """737,280 bytes are a block."""
    options = {"kv_memory": 6 * 737280, "kv_spill": kv_spill, "policy": "mlfq"}
    params = [params_of(index) for index in range(len(PROMPTS))]
    model = model_dir("smollm2-135m-instruct")
    with LLM(model, context_length=256, max_batch_tokens=64, **options) as llm:
        evict_again_and_again(llm)
        together = [completion.token_ids for completion in llm.generate(PROMPTS, params)]
        counters = llm._engine.scheduler.residency.counters
    assert together == real_alone
    assert counters.evictions > 10
    assert (counters.blocks_in > 0) == (kv_spill is not None)


class PatientAccounts(dict[int, Account]):
    """Of sequences that any guess may delay by any time."""

    def __setitem__(self, sequence_id: int, account: Account) -> None:
        account.won_seconds = 1e9
        super().__setitem__(sequence_id, account)


def speculate_on_everything(llm: LLM) -> None:
    """Every guess is drafted: making and verifying it costs nothing, and every text is thought to go on as
    guessed."""
    engine = llm._engine
    assert engine is not None
    speculator = engine.scheduler._speculator
    assert speculator is not None
    speculator._cost = FreeDrafts(engine.scheduler.cost)
    speculator._accounts = PatientAccounts()
    guesser = speculator.guesser
    assert isinstance(guesser, LookupGuesser | DraftGuesser)
    for match_length in (0, *(2**n for n in range(8))):
        for _ in range(1000):
            guesser.acceptance.observe(match_length, True)
    if isinstance(guesser, DraftGuesser):
        guesser.model.cost = FreeSteps(StepCost(fixed_seconds=0, prefill_seconds=0, decode_seconds=0))


class FreeSteps(OnlineStepCost):
    def observe(self, work: StepWork, seconds: float) -> None:
        pass


class FreeDrafts(VerificationCost):
    def curve(self, decodes: StepWork, num_drafts: int) -> list[float]:
        return [1.0] * (num_drafts + 1)

    def draft_seconds(self, decodes: StepWork) -> float:
        return 0.0


def speculative_params(index: int) -> SamplingParams:
    """As of params_of, with what depends on the tokens before, and ends within drafts."""
    return replace(
        params_of(index),
        max_tokens=60,
        presence_penalty=0.5 * (index % 2),
        logit_bias={300: 2.0} if index % 3 == 0 else {},
        logprobs=2 if index % 2 else None,
        stop=("the park", "happy") if index % 4 == 1 else (),
        n=1 + index % 2,
    )


def completions_of(llm: LLM, prompts: list[str]) -> list[tuple[object, ...]]:
    completions = llm.generate(prompts, [speculative_params(index) for index in range(len(prompts))])
    return [(c.text, c.token_ids, c.finish_reason, c.logprobs) for c in completions]


@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "int8"])
@pytest.mark.parametrize(
    "options",
    [{}, {"threads": 3}, {"max_sequences": 2}, {"max_batch_tokens": 6}, {"prefill_chunk_tokens": 5}],
    ids=str,
)
def test_completions_are_the_same_with_speculation(stories, kv_dtype, options) -> None:
    pytest.importorskip("fastserve._native")
    prompts = [3 * f"{prompt}. " for prompt in PROMPTS]
    with LLM(stories, weights="int8", kv_dtype=kv_dtype, threads=1) as llm:
        expected = completions_of(llm, prompts)
    with LLM(stories, weights="int8", kv_dtype=kv_dtype, speculation="prompt-lookup", **options) as llm:
        speculate_on_everything(llm)
        assert completions_of(llm, prompts) == expected
        counters = llm._engine.status().speculation
    assert 0 < counters.accepted_tokens < counters.drafted_tokens


@pytest.mark.parametrize("kv_dtype", ["f16", "int8"])
@pytest.mark.parametrize(
    "options",
    [
        {"draft_weights": "int4"},
        {"draft_layers": 4},
        {"draft_layers": 4, "threads": 3, "max_sequences": 2},
        {"draft_weights": "int8", "max_batch_tokens": 24},
        {"draft_weights": "int4", "prefill_chunk_tokens": 5, "draft_kv_memory": 5 * 2 * 5 * 4 * 32 * 20},
    ],
    ids=str,
)
def test_completions_are_the_same_with_a_draft_model(stories, kv_dtype, options) -> None:
    pytest.importorskip("fastserve._native")
    prompts = [3 * f"{prompt}. " for prompt in PROMPTS]
    with LLM(stories, weights="int8", kv_dtype=kv_dtype, threads=1) as llm:
        expected = completions_of(llm, prompts)
    with LLM(stories, weights="int8", kv_dtype=kv_dtype, speculation="draft", **options) as llm:
        speculate_on_everything(llm)
        assert completions_of(llm, prompts) == expected
        counters = llm._engine.status().speculation
    assert 0 < counters.accepted_tokens <= counters.drafted_tokens
    assert counters.guess_seconds > 0


@pytest.mark.parametrize("speculation", [{"speculation": "prompt-lookup"}, DRAFTED], ids=str)
@pytest.mark.parametrize("kv_spill", [None, "8MiB"])
def test_completions_are_the_same_with_speculation_while_blocks_are_taken(
    stories, kv_spill, speculation
) -> None:
    pytest.importorskip("fastserve._native")
    prompts = [3 * f"{prompt}. " for prompt in PROMPTS]
    options = {"context_length": 512, "weights": "int8", "max_batch_tokens": 64}
    with LLM(stories, **options) as llm:
        expected = completions_of(llm, prompts)
    memory = {"kv_memory": 16 * 2 * 5 * 4 * 32 * 16 * 2, "kv_spill": kv_spill, "policy": "mlfq"}
    with LLM(stories, **speculation, **options, **memory) as llm:
        speculate_on_everything(llm)
        evict_again_and_again(llm)
        assert completions_of(llm, prompts) == expected
        assert completions_of(llm, prompts) == expected  # prefixes are known
        assert llm._engine.status().speculation.accepted_tokens > 0
        assert llm._engine.scheduler.residency.counters.evictions > 10


@pytest.mark.parametrize("speculation", [{"speculation": "prompt-lookup"}, DRAFTED], ids=str)
def test_completions_of_the_real_model_are_the_same_with_speculation(model_dir, speculation) -> None:
    pytest.importorskip("fastserve._native")
    text = "The lighthouse keeper, who had lived there for forty years, polished the lamp every evening. "
    prompts = [f"{text}\nAgain, word by word: {text}\nOnce more: ", 2 * text, "To be, or not to be"]
    model = model_dir("smollm2-135m-instruct")
    params = [
        SamplingParams(max_tokens=50),
        SamplingParams(max_tokens=40, temperature=0.9, seed=3),
        SamplingParams(max_tokens=40, temperature=0.7, seed=1, repetition_penalty=1.2),
    ]
    with LLM(model) as llm:
        expected = [completion.token_ids for completion in llm.generate(prompts, params)]
    with LLM(model, **speculation) as llm:
        speculate_on_everything(llm)
        assert [completion.token_ids for completion in llm.generate(prompts, params)] == expected
        counters = llm._engine.status().speculation
    assert counters.accepted_tokens > 20
    assert counters.accepted_tokens < counters.drafted_tokens


def test_completions_of_one_prompt_are_those_of_their_seeds_alone(stories) -> None:
    pytest.importorskip("fastserve._native")
    params = SamplingParams(max_tokens=40, temperature=0.9, seed=7, n=5)
    with LLM(stories) as llm:
        together = llm.generate(PROMPTS[2], params)
        for index, completion in enumerate(together):
            seeded = SamplingParams(max_tokens=40, temperature=0.9, seed=7 + index)
            assert llm.generate(PROMPTS[2], seeded)[0].token_ids == completion.token_ids


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "kv_dtype"), [("f32", "f32"), ("bf16", "f16"), ("int4", "f16")])
def test_every_format_of_the_real_model_is_as_independent_of_the_batch(model_dir, weights, kv_dtype) -> None:
    model = model_dir("smollm2-135m-instruct")
    expected = tokens_alone(model, weights=weights, kv_dtype=kv_dtype)
    for options in ({"threads": 1}, {"prefill_chunk_tokens": 33}, {"threads": 3, "prefill_chunk_tokens": 7}):
        assert tokens_together(model, weights=weights, kv_dtype=kv_dtype, **options) == expected
