"""What is timed of a model: each measure is one figure, from one or two timed calls of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fastserve.evaluate.worker import Prompts

_DECODE_PROMPT_TOKENS = 16
_RAGGED_LENGTHS = tuple(int(length) for length in np.linspace(8, 128, 32))
_EQUAL_LENGTH = 64


class Timed(Protocol):
    """An engine whose calls can be timed, in seconds."""

    def generate(self, prompts: Prompts, max_tokens: int) -> float: ...

    def embed(self, texts: Prompts) -> float: ...


@dataclass(frozen=True, slots=True)
class Prefill:
    """Tokens per second of one prompt up to its first token."""

    num_tokens: int

    @property
    def context_tokens(self) -> int:
        return self.num_tokens + 1

    def run(self, engine: Timed, vocab_size: int) -> float:
        return self.num_tokens / engine.generate(make_prompts(1, self.num_tokens, vocab_size), 1)


@dataclass(frozen=True, slots=True)
class Decode:
    """Tokens per second after the first, of so many short prompts at once: a run of many tokens, less one of
    a single token each."""

    num_prompts: int
    num_tokens: int

    @property
    def context_tokens(self) -> int:
        return _DECODE_PROMPT_TOKENS + self.num_tokens + 1

    @property
    def calls(self) -> tuple[int, int]:
        """Tokens a prompt of the short run and of the long one."""
        return 1, 1 + self.num_tokens

    def prompts(self, vocab_size: int) -> Prompts:
        return make_prompts(self.num_prompts, _DECODE_PROMPT_TOKENS, vocab_size)

    def run(self, engine: Timed, vocab_size: int) -> float:
        prompts = self.prompts(vocab_size)
        short, long = (engine.generate(prompts, max_tokens) for max_tokens in self.calls)
        return self.num_prompts * self.num_tokens / max(long - short, 1e-9)


@dataclass(frozen=True, slots=True)
class Requests:
    """Output tokens per second of so many requests at once, the time of their prompts included."""

    num_prompts: int
    num_tokens: int = 128  # of each prompt, and of each completion

    @property
    def context_tokens(self) -> int:
        return 2 * self.num_tokens

    def run(self, engine: Timed, vocab_size: int) -> float:
        prompts = make_prompts(self.num_prompts, self.num_tokens, vocab_size)
        return self.num_prompts * self.num_tokens / engine.generate(prompts, self.num_tokens)


@dataclass(frozen=True, slots=True)
class Sentences:
    """Sentences per second of one batch, given their lengths in tokens."""

    lengths: tuple[int, ...]

    @property
    def context_tokens(self) -> int:
        return max(self.lengths)

    def run(self, engine: Timed, vocab_size: int) -> float:
        texts = [make_prompts(1, length, vocab_size)[0] for length in self.lengths]
        return len(texts) / engine.embed(texts)


Measure = Prefill | Decode | Requests | Sentences

DECODER_MEASURES: Mapping[str, Measure] = {
    "prefill_128_tokens_per_second": Prefill(128),
    "prefill_512_tokens_per_second": Prefill(512),
    "prefill_2048_tokens_per_second": Prefill(2048),
    "decode_1_tokens_per_second": Decode(1, 64),
    "decode_8_tokens_per_second": Decode(8, 32),
    "decode_32_tokens_per_second": Decode(32, 32),
    "batch_8_tokens_per_second": Requests(8),
    "batch_32_tokens_per_second": Requests(32),
}
ENCODER_MEASURES: Mapping[str, Measure] = {
    "equal_32_sentences_per_second": Sentences((_EQUAL_LENGTH,) * 32),
    "ragged_32_sentences_per_second": Sentences(_RAGGED_LENGTHS),
}


def make_prompts(num_prompts: int, num_tokens: int, vocab_size: int) -> list[list[int]]:
    """Random prompts, the same every time, of tokens from the middle of the vocabulary: none is special."""
    rng = np.random.default_rng(num_prompts * 10_000 + num_tokens)
    ids = rng.integers(vocab_size // 4, vocab_size // 2, size=(num_prompts, num_tokens))
    prompts: list[list[int]] = ids.tolist()
    return prompts
