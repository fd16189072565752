"""The least tokens that a text can have, found without encoding it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from tokenizers import Tokenizer, models, pre_tokenizers

from fastserve.checkpoint.tokenizer_library import steps_of
from fastserve.types import JsonObject

# Unicode's composition (UAX #15) makes one character of at most four.
_COMPOSED_CHARACTERS = 4
_CONTINUATION_BYTES = range(0x80, 0xC0)  # one is in every character beyond ASCII

# Between spaces, with a letter that no normalizer takes away.
_WORD = re.compile(r"[^ \t\r\n]*[A-Za-z0-9][^ \t\r\n]*")
_SCANNED_CHARACTERS = 1_000_000  # words of some 150,000 tokens; more are not looked for


class TokenBound(Protocol):
    """A number of tokens that a text has at least, special tokens not counted."""

    def min_tokens(self, text: str) -> int: ...


def find_token_bound(tokenizer: Tokenizer) -> TokenBound | None:
    """The bound of a tokenizer; None where none is certain, as with Unigram, whose unknown token takes any
    number of characters.
    """
    if isinstance(tokenizer.model, models.WordPiece):
        return WordBound.from_tokenizer(tokenizer)
    return CharacterBound.from_tokenizer(tokenizer) if isinstance(tokenizer.model, models.BPE) else None


@dataclass(frozen=True, slots=True)
class WordBound:
    """Every word is at least one token, the unknown one if none else."""

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> WordBound | None:
        """None where the text is not cut into words as BERT does."""
        kinds = [
            step["type"]
            for part in (tokenizer.normalizer, tokenizer.pre_tokenizer)
            for step in steps_of(part)
        ]
        return cls() if kinds == ["BertNormalizer", "BertPreTokenizer"] else None

    def min_tokens(self, text: str) -> int:
        return sum(1 for _ in _WORD.finditer(text, 0, _SCANNED_CHARACTERS))


@dataclass(frozen=True, slots=True)
class CharacterBound:
    """A token stands for at most `longest` characters of a text, but those in `dropped` may vanish."""

    longest: int
    dropped: str

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> CharacterBound | None:
        """None where other characters may vanish, or any number become one unknown token, or added tokens
        take the spaces beside them.
        """
        cuts = list(steps_of(tokenizer.pre_tokenizer))
        shrinks = [_shrinkage(step) for step in steps_of(tokenizer.normalizer)]
        dropped = _dropped_characters(tokenizer, cuts)
        added = tokenizer.get_added_tokens_decoder().values()
        if (
            dropped is None
            or None in shrinks
            or not all(_keeps_text(step) for step in cuts)
            or any(token.lstrip or token.rstrip for token in added)
        ):
            return None
        longest = max(map(len, tokenizer.get_vocab(with_added_tokens=True)))
        for factor in shrinks:
            longest *= factor or 1
        return cls(longest, dropped)

    def min_tokens(self, text: str) -> int:
        num_kept = len(text) - sum(map(text.count, self.dropped))
        return -(-num_kept // self.longest)


def _dropped_characters(tokenizer: Tokenizer, cuts: list[JsonObject]) -> str | None:
    """The characters that have no token for any of their bytes; None where such are not only in ASCII, or
    become an unknown token together.
    """
    if any(step["type"] == "ByteLevel" for step in cuts):
        letters = _byte_letters()
    elif tokenizer.model.byte_fallback:
        letters = {byte: f"<0x{byte:02X}>" for byte in range(256)}
    else:
        return None
    unknown = [byte for byte, letter in letters.items() if tokenizer.token_to_id(letter) is None]
    if any(byte in _CONTINUATION_BYTES for byte in unknown):
        return None
    return "".join(chr(byte) for byte in unknown if byte < _CONTINUATION_BYTES.start)


def _byte_letters() -> dict[int, str]:
    """How byte-level vocabularies spell the bytes of ASCII, and those that continue other characters."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters = range(_CONTINUATION_BYTES.stop)  # from U+0080 to U+00BF the last byte is the number
    return {number: splitter.pre_tokenize_str(chr(number))[0][0][-1] for number in characters}


def _keeps_text(step: JsonObject) -> bool:
    """Whether a pre-tokenizer only cuts a text, or adds to it."""
    if step["type"] in ("Split", "Punctuation"):
        return bool(step["behavior"] != "Removed")
    return step["type"] in ("ByteLevel", "Digits", "Metaspace")


def _shrinkage(step: JsonObject) -> int | None:
    """How many characters a normalizer makes one of at most; None where that is not known."""
    if step["type"] == "NFC":
        return _COMPOSED_CHARACTERS
    if step["type"] == "Prepend":
        return 1
    if step["type"] == "Replace":
        pattern = step["pattern"].get("String")
        return 1 if pattern is not None and len(pattern) <= len(step["content"]) else None
    return None
