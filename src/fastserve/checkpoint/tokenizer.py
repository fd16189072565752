"""Text to tokens and back, as the model's own files say."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.detokenize import DecodingRule, Detokenizer, StreamDecoder
from fastserve.checkpoint.token_bound import TokenBound, find_token_bound
from fastserve.checkpoint.tokenizer_library import name_panics
from fastserve.checkpoint.vocabulary import check_vocabulary, find_num_rows
from fastserve.errors import OptionError

if TYPE_CHECKING:
    import tokenizers

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """Token ids, and where each token comes from. All of one length."""

    ids: Sequence[int]
    types: Sequence[int]  # segment ids, as the tokenizer gives them
    parts: Sequence[int | None]  # 0: of the first text, 1: of the second, None: a special token
    offsets: Sequence[tuple[int, int]]  # in characters of its text, or of its word
    words: Sequence[int | None]  # of a text given as words, the index of the token's

    def __len__(self) -> int:
        return len(self.ids)


class Tokenizer:
    """The `tokenizers` library on the model's vocabulary, with an exact streaming decoder.

    `special_tokens` are the texts by role ("bos_token": "<s>"), as chat templates know them.

    >>> tokenizer = Tokenizer.from_checkpoint(open_checkpoint(Path("models/smollm2")))  # doctest: +SKIP
    >>> tokenizer.encode("Hello")  # doctest: +SKIP
    [19556]
    """

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Tokenizer:
        """The tokenizer of a folder's files (tokenizer.json or older ones), or of a GGUF file's metadata.

        Raises:
            CheckpointError: it is missing or corrupt, or is not of this model: their vocabularies disagree.
            UnsupportedError: a kind that we do not have.
        """
        if checkpoint.metadata is None:
            from fastserve.checkpoint.folder_tokenizer import build_from_folder

            built = build_from_folder(checkpoint.path)
        else:
            from fastserve.checkpoint.gguf_tokenizer import build_from_gguf

            built = build_from_gguf(checkpoint.metadata)
        num_rows = find_num_rows(checkpoint.config)
        if num_rows is None:
            return cls(*built)
        return cls(*built, unknown_to_model=check_vocabulary(built[0], num_rows, checkpoint.path))

    @classmethod
    def of_targets(cls, folder: Path, num_rows: int) -> Tokenizer:
        """That of what a Marian model writes whose targets have a vocabulary of their own, of `num_rows`.

        Raises:
            As `from_checkpoint`.
        """
        from fastserve.checkpoint.legacy_tokenizer import build_marian_target

        built = build_marian_target(folder)
        return cls(*built, unknown_to_model=check_vocabulary(built[0], num_rows, folder))

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        *,
        unknown_to_model: frozenset[int] = frozenset(),
    ) -> None:
        backend.no_truncation()  # stored settings of the training script (MiniLM's cuts at 128 and pads)
        backend.no_padding()
        self._backend = backend
        self._unknown_to_model = unknown_to_model  # special tokens that the model has no row for
        self.special_tokens = dict(special_tokens)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model may have more logits than that."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._special_id("eos_token")

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are no text: `decode` skips them unless told otherwise."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(id_ for id_, token in added.items() if token.special)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text. Special tokens written out in the text become those tokens.

        Raises:
            OptionError: the text holds half a surrogate pair, which no encoding of characters has; or a
                special token that the tokenizer has and the model has not.
            CheckpointError: the tokenizer's rules cannot be followed on this text.
        """
        try:
            with name_panics():
                ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise _no_unicode(text) from error
        self._check_known(ids)
        return ids

    def encode_with_origin(self, text: str | Sequence[str], pair: str | None = None) -> Encoding:
        """The tokens of a text, or of its words, or of two texts, with special tokens and where each is from.

        Raises:
            As `encode`.
        """
        is_split = not isinstance(text, str)
        try:
            with name_panics():
                found = self._backend.encode(list(text) if is_split else text, pair, is_pretokenized=is_split)
        except (TypeError, UnicodeEncodeError) as error:
            raise _no_unicode("".join([*text, pair or ""])) from error
        self._check_known(found.ids)
        return Encoding(
            ids=found.ids,
            types=found.type_ids,
            parts=found.sequence_ids,
            offsets=found.offsets,
            words=found.word_ids,
        )

    def _check_known(self, ids: Sequence[int]) -> None:
        if self._unknown_to_model and (unknown := self._unknown_to_model.intersection(ids)):
            token = self.token_text(min(unknown))
            raise OptionError(
                f"the text has the special token {token!r}, which the model does not know",
                hint="remove it from the text",
                option="prompt",
            )

    def min_tokens(self, text: str) -> int:
        """A number of tokens that `text` has at least, found without encoding it; 0 where none is certain."""
        return self._bound.min_tokens(text) if self._bound else 0

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids: what a `StreamDecoder` gives piece by piece, joined.

        Differs from the `tokenizers` library only where byte tokens (`<0xE4>`) make no valid UTF-8: there the
        library replaces every byte of the run, this only the invalid part, as it does for byte-level tokens.
        """
        stream = self.stream_decoder(skip_special_tokens=skip_special_tokens)
        pieces = [stream.push(token_id) for token_id in ids]
        return "".join([*pieces, stream.finish()])

    def stream_decoder(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder for one completion.

        Raises:
            UnsupportedError: the tokenizer decodes in a way that we do not have.
        """
        return StreamDecoder(self._detokenizer, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it (`Ġthe`); None outside of it."""
        return _token_text(self._backend, token_id)

    def token_bytes(self, token_id: int) -> bytes | None:
        """What the token adds to a text that has others before it; None outside of the vocabulary. Special
        tokens, which `decode` skips, give their names."""
        return self._detokenizer.piece(token_id, is_first=False)

    def token_id(self, text: str) -> int | None:
        """The id of the token that the vocabulary spells `text`."""
        token_id: int | None = self._backend.token_to_id(text)
        return token_id

    @cached_property
    def _bound(self) -> TokenBound | None:
        return find_token_bound(self._backend)

    @cached_property
    def _detokenizer(self) -> Detokenizer:
        decoder = self._backend.decoder
        rule = DecodingRule.from_json(None if decoder is None else json.loads(decoder.__getstate__()))
        # Not a method of this object: it would have itself by it, and be kept when nobody else has it.
        return Detokenizer(rule, partial(_token_text, self._backend), self.special_ids)

    def _special_id(self, role: str) -> int | None:
        text = self.special_tokens.get(role)
        return None if text is None else self.token_id(text)


def _no_unicode(text: str) -> OptionError:
    half = _SURROGATE.search(text)
    assert half is not None
    return OptionError(
        f"the text is not valid Unicode: at character {half.start()} is half a pair, U+{ord(half[0]):04X}",
        hint="give text in UTF-8; a file in another encoding must be converted first",
        option="prompt",
    )


def _token_text(backend: tokenizers.Tokenizer, token_id: int) -> str | None:
    if not 0 <= token_id < 2**32:
        return None
    token: str | None = backend.id_to_token(token_id)
    return token
