"""AsyncLLM on a tiny real model: what it streams is what LLM gives, whoever reads, waits or goes away."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastserve.config import EngineOptions
from fastserve.constraint import Regex
from fastserve.engine.async_llm import AsyncLLM
from fastserve.engine.llm import LLM
from fastserve.engine.sequence import Sequence
from fastserve.engine.turnstile import Turnstile
from fastserve.errors import ContextLengthError, DeadlineError, OptionError, QueueFullError, StepError
from fastserve.types import SamplingParams

pytest.importorskip("fastserve._native")

PROMPTS = ["Once upon a time", "The dog", "One day, a cat", "He", "Lily and Tom went to the park."]
OPTIONS = EngineOptions(threads=1, context_length=256, kv_memory="1MiB")


def params_of(index: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=10 + 7 * index, temperature=0.8 * (index % 2), seed=index, ignore_eos=True
    )


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), timeout=60))


@asynccontextmanager
async def opened(model: Path, options: EngineOptions = OPTIONS) -> AsyncIterator[AsyncLLM]:
    async with AsyncLLM(model, options) as llm:
        yield llm
        status = await llm.status()
        while status.num_waiting or status.num_resident or status.num_slow:
            status = await llm.status()
        assert status.num_free_blocks == status.num_blocks


@pytest.fixture(scope="module")
def alone(stories: Path) -> list[tuple[int, ...]]:
    with LLM(stories, threads=1) as llm:
        return [llm.generate(prompt, params_of(i))[0].token_ids for i, prompt in enumerate(PROMPTS)]


def test_many_callers_get_what_each_gets_alone(stories, alone) -> None:
    async def main() -> None:
        async with opened(stories) as llm:
            calls = (llm.generate(prompt, params_of(i)) for i, prompt in enumerate(PROMPTS))
            assert [c.token_ids for (c,) in await asyncio.gather(*calls)] == alone

    run(main)


def test_the_chunks_of_a_stream_are_its_completion(stories, alone) -> None:
    async def main() -> None:
        async with opened(stories) as llm:
            chunks = [chunk async for chunk in llm.stream(PROMPTS[0], params_of(0))]
            assert tuple(chunk.token_id for chunk in chunks) == alone[0]
            completion = chunks[-1].completion
            assert completion is not None
            assert "".join(chunk.text for chunk in chunks) == completion.text

    run(main)


def test_several_completions_of_a_prompt_are_those_of_its_seeds(stories) -> None:
    async def main() -> None:
        async with opened(stories) as llm:
            several = await llm.generate(
                "The dog", SamplingParams(max_tokens=12, temperature=1.0, seed=3, n=4)
            )
            assert [completion.index for completion in several] == [0, 1, 2, 3]
            for index, completion in enumerate(several):
                params = SamplingParams(max_tokens=12, temperature=1.0, seed=3 + index)
                assert (await llm.generate("The dog", params))[0].token_ids == completion.token_ids

    run(main)


@pytest.mark.parametrize("num_read", [0, 1, 5])
def test_a_stream_that_is_closed_frees_everything_before_its_first_token_too(stories, num_read) -> None:
    async def main() -> None:
        async with opened(stories) as llm:
            stream = await llm.submit("Once upon a time", SamplingParams(max_tokens=200, ignore_eos=True))
            for _ in range(num_read):
                await anext(stream)
            stream.close()
            stream.close()
            assert [chunk async for chunk in stream] == []

    run(main)


def test_a_call_that_is_cancelled_frees_everything(stories) -> None:
    async def main() -> None:
        async with opened(stories) as llm:
            for delay in (0.0, 0.001, 0.02):
                call = asyncio.create_task(
                    llm.generate("Once upon a time", SamplingParams(max_tokens=200, ignore_eos=True))
                )
                await asyncio.sleep(delay)
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call

    run(main)


def test_a_reader_that_is_behind_holds_only_itself(stories, alone, monkeypatch) -> None:
    monkeypatch.setattr("fastserve.engine.async_llm._MOST_UNREAD", 8)
    monkeypatch.setattr("fastserve.engine.async_llm._FEW_UNREAD", 2)

    async def main() -> None:
        async with opened(stories) as llm:
            slow = await llm.submit(PROMPTS[4], params_of(4))
            first = await anext(slow)
            others = [await llm.generate(PROMPTS[i], params_of(i)) for i in range(4)]
            assert [completions[0].token_ids for completions in others] == alone[:4]
            assert len(slow._unread) < params_of(4).max_tokens - 1
            rest = [chunk async for chunk in slow]
            slow.close()
            assert tuple(chunk.token_id for chunk in [first, *rest]) == alone[4]

    run(main)


def test_what_is_refused_is_refused_where_it_was_asked_and_the_others_go_on(stories, alone) -> None:
    async def main() -> None:
        async with opened(stories) as llm:
            good = asyncio.create_task(llm.generate(PROMPTS[4], params_of(4)))
            with pytest.raises(ContextLengthError, match="the context is 256"):
                await llm.generate([1] * 300)
            with pytest.raises(OptionError, match="outside the model's vocabulary"):
                await llm.generate([10**6])
            with pytest.raises(OptionError, match="policy 'lifo' is unknown"):
                await llm.set_policy("lifo")
            assert (await good)[0].token_ids == alone[4]

    run(main)


def test_the_policy_changes_while_requests_run(stories, alone) -> None:
    async def main() -> None:
        async with opened(stories) as llm:
            calls = asyncio.gather(*(llm.generate(prompt, params_of(i)) for i, prompt in enumerate(PROMPTS)))
            for policy in ("mlfq", "sjf", "priority", "mlfq-published", "fcfs"):
                await llm.set_policy(policy)
                assert (await llm.status()).policy == policy
            assert [c.token_ids for (c,) in await calls] == alone

    run(main)


def test_closing_ends_what_still_streams_with_an_error(stories) -> None:
    async def main() -> None:
        llm = AsyncLLM(stories, OPTIONS)
        stream = await llm.submit("Once upon a time", SamplingParams(max_tokens=200, ignore_eos=True))
        await llm.close()
        with pytest.raises(OptionError, match="is closed"):
            [chunk async for chunk in stream]
        with pytest.raises(OptionError, match="is closed"):
            await llm.generate("The dog")
        await llm.close()

    run(main)


@pytest.mark.parametrize("policy", ["fcfs", "mlfq"])
def test_two_hundred_requests_some_cancelled_under_memory_pressure_all_end(stories, policy) -> None:
    """With a slow tier, and memory for about three of them at once."""
    options = EngineOptions(
        threads=1, context_length=256, kv_memory="200KB", kv_spill="1MiB", policy=policy, max_sequences=8
    )

    async def main() -> None:
        rng = random.Random(1)
        async with opened(stories, options) as llm:

            async def request(index: int) -> None:
                params = SamplingParams(max_tokens=rng.randint(1, 60), ignore_eos=True, seed=index)
                if index % 5 == 0:
                    stream = await llm.submit(PROMPTS[index % 5], params)
                    await anext(stream)
                    stream.close()
                    return
                (completion,) = await llm.generate(PROMPTS[index % 5], params)
                assert completion.completion_tokens == params.max_tokens

            await asyncio.gather(*(request(index) for index in range(200)))

    run(main)


def test_a_defect_of_the_engine_reaches_all_who_wait_and_all_who_come_later(stories, monkeypatch) -> None:
    async def main() -> None:
        async with AsyncLLM(stories, OPTIONS) as llm:
            stream = await llm.submit("Once upon a time", SamplingParams(max_tokens=200, ignore_eos=True))
            await anext(stream)
            monkeypatch.setattr(llm._worker._engine, "step", lambda: 1 / 0)
            with pytest.raises(StepError, match="does not run: its engine has ended: ZeroDivisionError"):
                [chunk async for chunk in stream]
            with pytest.raises(StepError, match="does not run"):
                await llm.generate("The dog")

    run(main)


def test_a_deadline_a_full_queue_and_an_unknown_class_are_errors_of_the_caller_alone(stories, alone) -> None:
    options = replace(OPTIONS, max_waiting=2, max_sequences=1, tenant_weights={"a": 2.0})

    async def main() -> None:
        async with opened(stories, options) as llm:
            long = SamplingParams(max_tokens=200, ignore_eos=True)
            late = asyncio.create_task(llm.generate("He", long, tenant="a", session="s", timeout_ms=30))
            kept = asyncio.create_task(llm.generate(PROMPTS[0], params_of(0), priority_class="batch"))
            with pytest.raises(OptionError, match="priority_class='urgent' is unknown"):
                await llm.generate("He", long, priority_class="urgent")
            with pytest.raises(OptionError, match="timeout_ms=-1 is out of range"):
                await llm.submit("He", long, timeout_ms=-1)
            (completion,) = await late
            with pytest.raises(DeadlineError, match=r"its timeout_ms of 30 has passed|no turn while"):
                completion.checked()
            assert (await kept)[0].token_ids == alone[0]
            crowd = [asyncio.create_task(llm.generate("He", long)) for _ in range(8)]
            results = await asyncio.gather(*crowd, return_exceptions=True)
            refused = [result for result in results if isinstance(result, QueueFullError)]
            assert refused
            assert all(error.retry_after_seconds > 0 for error in refused)
            assert len([result for result in results if isinstance(result, list)]) + len(refused) == 8
            assert (await llm.status()).num_expired == 1

    run(main)


def test_a_length_predictor_knows_where_requests_came_by(stories) -> None:
    asked = []

    class Listener:
        def kind(self, sequence: Sequence) -> str:
            asked.append((sequence.tenant, sequence.endpoint))
            return ""

    async def main() -> None:
        async with AsyncLLM(stories, OPTIONS, length_predictor=Listener()) as llm:
            params = SamplingParams(max_tokens=2)
            stream = await llm.submit("He", params, tenant="a", endpoint="one")
            [chunk async for chunk in stream]
            [chunk async for chunk in llm.stream("He", params, endpoint="two")]
            await llm.generate("He", params, tenant="b", endpoint="three")

    run(main)
    assert asked == [("a", "one"), ("", "two"), ("b", "three")]


def test_an_engine_is_late_only_while_it_has_work(stories, monkeypatch) -> None:
    is_running, may_end = threading.Event(), threading.Event()

    async def main() -> None:
        async with opened(stories) as llm:
            engine = llm._worker._engine
            run_step = engine._run

            def wait(turns: Any) -> Any:
                is_running.set()
                may_end.wait(20)
                return run_step(turns)

            monkeypatch.setattr(engine, "_run", wait)
            await llm.status()
            await asyncio.sleep(0.5)
            assert llm.seconds_without_step == 0
            call = asyncio.create_task(llm.generate("He", SamplingParams(max_tokens=2)))
            await asyncio.to_thread(is_running.wait, 20)
            assert llm.seconds_without_step < 0.5
            await asyncio.sleep(0.5)
            assert llm.seconds_without_step >= 0.5
            may_end.set()
            await call

    run(main)


class Metered:
    """What a meter was given."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.seconds = 0.0

    def __call__(self, num_tokens: int, seconds: float) -> None:
        self.num_tokens += num_tokens
        self.seconds += seconds


@pytest.mark.parametrize("num_read", [0, 1, 5, None])
def test_a_meter_gets_all_tokens_and_seconds_also_of_what_is_given_up(stories, monkeypatch, num_read) -> None:
    served: list[Sequence] = []

    async def main() -> None:
        async with opened(stories) as llm:
            enter = llm._worker._engine.scheduler.add

            def note(sequence: Sequence, now: float) -> None:
                served.append(sequence)
                enter(sequence, now)

            monkeypatch.setattr(llm._worker._engine.scheduler, "add", note)
            meter = Metered()
            params = SamplingParams(max_tokens=30, ignore_eos=True)
            stream = await llm.submit("Once upon a time", params, meter=meter)
            if num_read is None:
                chunks = [chunk async for chunk in stream]
                assert chunks[-1].completion is not None
                assert meter.seconds == pytest.approx(chunks[-1].completion.service_seconds)
            else:
                for _ in range(num_read):
                    await anext(stream)
            stream.close()
            await llm.status()  # comes after the answer to the end of the stream
            (sequence,) = served
            assert meter.num_tokens == sequence.num_completion_tokens
            assert meter.seconds == pytest.approx(sequence.service_seconds)
            assert not llm._aborting

    run(main)


def test_weights_of_tenants_that_are_wrong_are_an_error_of_the_caller(stories) -> None:
    async def main() -> None:
        async with opened(stories) as llm:
            await llm.set_tenant_weights({"a": 2.0})
            with pytest.raises(OptionError, match="tenant_weights"):
                await llm.set_tenant_weights({"a": -1.0})

    run(main)


def test_models_that_take_turns_each_answer_as_alone(stories, alone) -> None:
    class Watched(Turnstile):
        num_within = num_passed = 0

        def __enter__(self) -> None:
            super().__enter__()
            self.num_within += 1
            self.num_passed += 1
            assert self.num_within == 1

        def __exit__(self, *reason: object) -> None:
            self.num_within -= 1
            super().__exit__(*reason)

    async def main() -> None:
        turnstile = Watched()
        llms = [AsyncLLM(stories, OPTIONS, turnstile=turnstile) for _ in range(3)]
        calls = [llm.generate(prompt, params_of(i)) for llm in llms for i, prompt in enumerate(PROMPTS)]
        assert [c.token_ids for (c,) in await asyncio.gather(*calls)] == 3 * alone
        num_steps = sum([sum((await llm.status()).steps.num_sequences.counts) for llm in llms])
        assert turnstile.num_passed >= num_steps
        for llm in llms:
            await llm.close()

    run(main)


def test_a_closed_model_is_given_back_with_its_last_use_without_the_garbage_collector(stories) -> None:
    async def use() -> list[weakref.ref[Any]]:
        async with AsyncLLM(stories, OPTIONS) as llm:
            constraint = Regex("[a-z]+")
            for params in (SamplingParams(max_tokens=4), SamplingParams(max_tokens=4, constraint=constraint)):
                await llm.generate("He", params)
            return [weakref.ref(thing) for thing in (llm, llm.model.executable, llm.model.tokenizer)]

    gc.collect()
    gc.disable()
    try:
        assert [thing() for thing in asyncio.run(use())] == [None, None, None]
    finally:
        gc.enable()
