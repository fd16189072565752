"""Texts within a model's context: refused, cut short, or cut into windows that overlap."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from fastserve.checkpoint.tokenizer import Encoding
from fastserve.engine.encoder import EncoderInput
from fastserve.engine.load import LoadedModel
from fastserve.errors import ContextLengthError
from fastserve.models.config import EncoderConfig

_DEFAULT_STRIDE = 64


@dataclass(frozen=True, slots=True)
class Window:
    """Some tokens of an encoding, by their indices, and the input that they make."""

    tokens: Seq[int]
    input: EncoderInput


def fit(model: LoadedModel, encoding: Encoding, *, truncate: bool) -> EncoderInput:
    """All of an encoding, as one input.

    Args:
        truncate: cut what is longer than the model was tuned with at the ends of its texts, the longer one
            first, as `transformers` does (`longest_first`), instead of refusing what it cannot take.

    Raises:
        ContextLengthError: it is longer than the model's limit.
    """
    limit = model.reading_length if truncate else model.context_length
    if len(encoding) <= limit:
        return _window(model, encoding, range(len(encoding))).input
    if not truncate:
        raise ContextLengthError(
            f"a text has {len(encoding)} tokens; the model takes at most {limit}",
            hint="split the text, or ask for truncation",
        )
    lengths = [encoding.parts.count(part) for part in (0, 1)]
    room = limit - (len(encoding) - sum(lengths))
    kept = _longest_first(lengths[0], lengths[1], max(room, 0))
    seen = [0, 0]
    tokens = []
    for index, part in enumerate(encoding.parts):
        if part is not None:
            seen[part] += 1
        if part is None or seen[part] <= kept[part]:
            tokens.append(index)
    return _window(model, encoding, tokens[:limit]).input


def cut(model: LoadedModel, encoding: Encoding, *, part: int, stride: int) -> list[Window]:
    """Windows of an encoding, as long as the model was tuned with, whose `part` is cut where it must be; the
    rest of it is in each of them.

    Args:
        stride: tokens of the part that neighbours share, where there is room for twice as many.

    Raises:
        ContextLengthError: the rest alone leaves no room.
    """
    limit = model.reading_length
    if len(encoding) <= limit:
        return [_window(model, encoding, range(len(encoding)))]
    place = [index for index, own in enumerate(encoding.parts) if own == part]
    room = limit - (len(encoding) - len(place))
    if room < 1:
        raise ContextLengthError(
            f"the question has {limit - room} tokens; the model takes {limit}, its text included",
            hint="ask a shorter question",
        )
    before, after = range(place[0]), range(place[-1] + 1, len(encoding))
    windows = []
    advance = room - min(stride, room // 2)
    for start in range(0, len(place), advance):
        own = place[start : start + room]
        windows.append(_window(model, encoding, [*before, *own, *after]))
        if start + room >= len(place):
            break
    return windows


def stride_of(model: LoadedModel) -> int:
    """Tokens that neighbouring windows of a text share, as fastserve.json says."""
    stride = model.checkpoint.card.get("stride", _DEFAULT_STRIDE)
    return stride if type(stride) is int and stride >= 0 else _DEFAULT_STRIDE


def _window(model: LoadedModel, encoding: Encoding, tokens: Seq[int]) -> Window:
    has_types = isinstance(model.config, EncoderConfig) and model.config.num_token_types > 1
    types = [encoding.types[index] for index in tokens] if has_types else None
    ids = [encoding.ids[index] for index in tokens]
    return Window(tokens, EncoderInput(ids, types, member=model.member_index))


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts are kept, as the `tokenizers` library has it: the shorter one whole where
    it leaves as much for the other, else half each.

    >>> _longest_first(10, 3, 8), _longest_first(10, 9, 7), _longest_first(9, 0, 4)
    ((5, 3), (4, 3), (4, 0))
    """
    short, long = sorted((first, second))
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    return (long, short) if first > second else (short, long)
