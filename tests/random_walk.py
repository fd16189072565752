"""Texts that a constraint allows, drawn without a model: byte by byte, such that they end soon."""

from __future__ import annotations

import random

import numpy as np

from fastserve.constraint import Constraint
from fastserve.engine.guide import ConstraintCompiler, Guide

_END = 256
_CLOSING = frozenset(b'"]}')
_SHORT = frozenset(b'"]},:')


class ByteTokenizer:
    """Token n is the byte n; the last one ends."""

    special_ids = frozenset({_END})

    def token_bytes(self, token_id: int) -> bytes | None:
        return bytes([token_id]) if token_id < _END else b"<end>"

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())


def byte_compiler() -> ConstraintCompiler:
    return ConstraintCompiler(ByteTokenizer(), vocab_size=257, eos_token_ids=[_END])  # type: ignore[arg-type]


_COMPILER = byte_compiler()


def draw_texts(constraint: Constraint, *, count: int, most_bytes: int = 400) -> list[str]:
    """Up to `count` texts, those left out that are too long."""
    guide = _COMPILER.compile(constraint)
    texts = (_walk(guide.fork(), random.Random(seed), most_bytes) for seed in range(count))
    return [text for text in texts if text is not None]


def _walk(guide: Guide, rng: random.Random, most_bytes: int) -> str | None:
    text = bytearray()
    while len(text) < most_bytes:
        byte = _choose(_allowed(guide), rng, is_long=len(text) > 60)
        if byte == _END:
            return text.decode()
        text.append(byte)
        guide.advance(byte)
        assert guide.error is None
        if guide.is_over:
            return text.decode()
    return None


def _allowed(guide: Guide) -> list[int]:
    words = np.zeros((1, 9), np.uint32)
    guide.fill_masks(words)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def _choose(allowed: list[int], rng: random.Random, *, is_long: bool) -> int:
    assert allowed
    if _END in allowed and (len(allowed) == 1 or is_long or rng.random() < 0.5):
        return _END
    closing = [byte for byte in allowed if byte in (_CLOSING if is_long else _SHORT)]
    if closing and rng.random() < (0.9 if is_long else 0.4):
        return rng.choice(closing)
    printable = [byte for byte in allowed if 0x20 < byte < 0x7F]
    return rng.choice(printable or [byte for byte in allowed if byte != _END])
