"""The vocabulary of the fake executable, as constraints see it: token n is the letter n % 26; the last one
ends."""

from __future__ import annotations

from fake_executable import VOCAB_SIZE, letter

from fastserve.engine.guide import ConstraintCompiler

EOS = VOCAB_SIZE - 1


class LetterTokenizer:
    special_ids = frozenset({EOS})

    def token_bytes(self, token_id: int) -> bytes | None:
        return letter(token_id).encode()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) - ord("a") for character in text if character in "abcdefghijklmnopqrstuvwxyz"]


def letter_compiler() -> ConstraintCompiler:
    return ConstraintCompiler(LetterTokenizer(), vocab_size=VOCAB_SIZE, eos_token_ids=[EOS])  # type: ignore[arg-type]
