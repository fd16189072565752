"""Tokens to text, one by one: whole characters only, and together exactly the text of all tokens at once.

A token adds bytes that depend on nothing but the token and whether it is the first. The text is those bytes
read as UTF-8, each maximal invalid part replaced by U+FFFD; at most three bytes ever wait for the rest of a
character.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from fastserve.errors import UnsupportedError
from fastserve.types import JsonObject

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# What a WordPiece decoder takes back from the spaces between words (tokenizers, decoders/wordpiece.rs).
_CLEANUPS = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
    (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class DecodingRule:
    """How a tokenizer's tokens make text: the `decoder` of its tokenizer.json."""

    to_bytes: Callable[[str, bool], bytes]  # (token, is it the first) → what it adds
    num_stripped: int = 0  # so many spaces are dropped where the text begins with them

    @classmethod
    def from_json(cls, decoder: JsonObject | None) -> DecodingRule:
        """Read the `decoder` of a tokenizer.json.

        Raises:
            UnsupportedError: a decoder, or a chain of them, that we do not have.
        """
        steps = _flatten(decoder)
        match [step["type"] for step in steps]:
            case []:
                return cls(_spaced)
            case ["ByteLevel"]:
                return cls(_byte_level)
            case ["WordPiece"]:
                return cls(_word_piece(steps[0]["prefix"], steps[0]["cleanup"]))
            case ["Metaspace"]:
                return cls(_metaspace(steps[0]))
            case [*kinds] if _is_piece_chain(kinds):
                return _pieces(steps)
        raise _unsupported(decoder)


class Detokenizer:
    """The rule of one tokenizer applied to its vocabulary; shared by all streams."""

    def __init__(
        self, rule: DecodingRule, token_text: Callable[[int], str | None], special_ids: Collection[int]
    ) -> None:
        self.num_stripped = rule.num_stripped
        self.special_ids = frozenset(special_ids)
        self._to_bytes = rule.to_bytes
        self._token_text = token_text
        self._pieces: dict[tuple[int, bool], bytes | None] = {}

    def piece(self, token_id: int, is_first: bool) -> bytes | None:
        """What the token adds to the text; None where there is no such token."""
        key = (token_id, is_first)
        if key not in self._pieces:
            token = self._token_text(token_id)
            self._pieces[key] = None if token is None else self._to_bytes(token, is_first)
        return self._pieces[key]


class StreamDecoder:
    """The text of one completion as its tokens arrive. Constant time a token.

    >>> stream = tokenizer.stream_decoder()  # doctest: +SKIP
    >>> [stream.push(token_id) for token_id in (171, 120, 236)] + [stream.finish()]  # doctest: +SKIP
    ['', '', '，', '']
    """

    def __init__(self, detokenizer: Detokenizer, *, skip_special_tokens: bool = True) -> None:
        self._detokenizer = detokenizer
        self._skipped = detokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_first = True
        self._num_to_strip = detokenizer.num_stripped

    def push(self, token_id: int) -> str:
        """The characters that this token completes; may be empty. Ids outside the vocabulary add nothing."""
        piece = None if token_id in self._skipped else self._detokenizer.piece(token_id, self._is_first)
        if piece is None:
            return ""
        self._is_first = False
        return self._strip(self._utf8.decode(piece))

    def finish(self) -> str:
        """U+FFFD where the last character is incomplete, else nothing. No token may follow."""
        return self._strip(self._utf8.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        while text and self._num_to_strip:
            if text[0] != " ":
                self._num_to_strip = 0
                break
            text = text[1:]
            self._num_to_strip -= 1
        return text


def _flatten(decoder: JsonObject | None) -> list[JsonObject]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _flatten(inner)]
    return [decoder]


def _unsupported(decoder: JsonObject | None) -> UnsupportedError:
    names = " → ".join(str(step["type"]) for step in _flatten(decoder))
    return UnsupportedError(
        f"the tokenizer decodes by {names}, which is not supported",
        hint="supported are ByteLevel, WordPiece, Metaspace; Replace, ByteFallback, Fuse, Strip in a chain",
    )


def _spaced(token: str, is_first: bool) -> bytes:
    return (token if is_first else f" {token}").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's character for every byte, inverted: printable Latin-1 is itself, the rest from U+0100 on.

    Source: bytes_to_unicode of openai/gpt-2 src/encoder.py.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_ALPHABET = _byte_alphabet()


def _byte_level(token: str, is_first: bool) -> bytes:
    try:
        return bytes(_BYTE_ALPHABET[char] for char in token)
    except KeyError:  # an added token is written as it is
        return token.encode()


def _word_piece(prefix: str, cleanup: bool) -> Callable[[str, bool], bytes]:
    def to_bytes(token: str, is_first: bool) -> bytes:
        if not is_first:
            token = token.removeprefix(prefix) if token.startswith(prefix) else f" {token}"
        for old, new in _CLEANUPS if cleanup else ():
            token = token.replace(old, new)
        return token.encode()

    return to_bytes


def _metaspace(step: JsonObject) -> Callable[[str, bool], bytes]:
    replacement = step["replacement"]
    is_prepended = step.get("prepend_scheme", "always") != "never"

    def to_bytes(token: str, is_first: bool) -> bytes:
        return token.replace(replacement, "" if is_first and is_prepended else " ").encode()

    return to_bytes


def _is_piece_chain(kinds: list[Any]) -> bool:
    """Replacements, then bytes, then what the whole text is stripped of."""
    return (
        re.fullmatch(r"(Replace )*(ByteFallback )?(Fuse (Strip )?)?", "".join(f"{kind} " for kind in kinds))
        is not None
    )


def _pieces(steps: list[JsonObject]) -> DecodingRule:
    replacements = []
    has_bytes = False
    num_stripped = 0
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "ByteFallback"}:
                has_bytes = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Strip", "content": " ", "start": int(num_stripped), "stop": 0}:
                pass
            case _:
                raise _unsupported(step)

    def to_bytes(token: str, is_first: bool) -> bytes:
        for old, new in replacements:
            token = token.replace(old, new)
        byte = _BYTE_TOKEN.fullmatch(token) if has_bytes else None
        return bytes.fromhex(byte[1]) if byte else token.encode()

    return DecodingRule(to_bytes, num_stripped)
