"""Evictions that no policy would make: what is computed must not show them."""

from __future__ import annotations

import itertools

from fastserve.engine.completion import Chunk
from fastserve.engine.llm import LLM


def evict_again_and_again(llm: LLM) -> None:
    """Every third step begins with the eviction of a sequence, each in turn."""
    engine = llm._engine
    assert engine is not None
    scheduler, step, numbers = engine.scheduler, engine.step, itertools.count()

    def evicting_step() -> list[Chunk]:
        number, residents = next(numbers), [s for s in scheduler.sequences if s.is_resident]
        if residents and number % 3 == 0:
            scheduler.residency.evict(residents[number // 3 % len(residents)])
        return step()

    engine.step = evicting_step  # type: ignore[method-assign]
