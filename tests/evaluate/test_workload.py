from __future__ import annotations

import pytest

from fastserve.evaluate.worker import Prompts
from fastserve.evaluate.workload import DECODER_MEASURES, Decode, Prefill, Requests, Sentences, make_prompts


class FakeEngine:
    """Takes a second for each prompt token and ten for each further token of a completion."""

    def __init__(self) -> None:
        self.generated: list[tuple[int, int]] = []

    def generate(self, prompts: Prompts, max_tokens: int) -> float:
        self.generated.append((len(prompts), max_tokens))
        return sum(len(prompt) + 10.0 * (max_tokens - 1) for prompt in prompts)

    def embed(self, texts: Prompts) -> float:
        return float(sum(map(len, texts)))


def test_prefill_is_the_rate_of_one_prompt_up_to_its_first_token() -> None:
    engine = FakeEngine()
    assert Prefill(128).run(engine, 1000) == 1.0
    assert engine.generated == [(1, 1)]


def test_decoding_leaves_out_the_time_of_prompt_and_first_token() -> None:
    engine = FakeEngine()
    assert Decode(8, 32).run(engine, 1000) == pytest.approx(0.1)
    assert engine.generated == [(8, 1), (8, 33)]


def test_requests_include_the_time_of_their_prompts() -> None:
    assert Requests(32).run(FakeEngine(), 1000) == pytest.approx(128 / (128 + 10 * 127))


def test_sentences_are_counted_whatever_their_lengths() -> None:
    assert Sentences((2, 4)).run(FakeEngine(), 1000) == pytest.approx(2 / 6)


def test_a_measure_says_what_context_it_needs() -> None:
    contexts = {name: measure.context_tokens for name, measure in DECODER_MEASURES.items()}
    assert contexts["prefill_512_tokens_per_second"] == 513
    assert contexts["batch_32_tokens_per_second"] == 256
    assert contexts["decode_1_tokens_per_second"] == 16 + 65


def test_prompts_are_the_same_every_time_and_differ_from_each_other() -> None:
    prompts = make_prompts(3, 50, 1000)
    assert prompts == make_prompts(3, 50, 1000)
    assert len({tuple(prompt) for prompt in prompts}) == 3
    assert all(250 <= token_id < 500 for prompt in prompts for token_id in prompt)
