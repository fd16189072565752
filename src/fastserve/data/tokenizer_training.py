"""Training of subword tokenizers on texts: byte-level BPE, WordPiece, Unigram."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fastserve.errors import OptionError
from fastserve.option import check_choice, check_integer

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_KINDS = ("bpe", "wordpiece", "unigram")
DEFAULT_VOCAB_SIZE = 8000

_DIGITS = 3  # of scores: runs differ by some 1e-11, and no likely segmentation by as little as this
_DEALT = 1e-4  # between the scores of characters that the library adds (trainers/unigram, finalize)
_SAME = 1e-8

_SPECIALS: dict[str, dict[str, str]] = {
    "bpe": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|padding|>"},
    "wordpiece": {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    },
    "unigram": {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
}


def train_tokenizer(
    texts: Iterable[str], kind: str = "bpe", *, vocab_size: int = DEFAULT_VOCAB_SIZE, lowercase: bool = False
) -> tokenizers.Tokenizer:
    """Train a tokenizer, which `save_tokenizer` writes as models have it. The same texts in the same order
    give the same tokenizer: exactly of `bpe` and `wordpiece`; of `unigram` but for pieces between which
    nothing but the last bits of sums decides, which the library adds up in an order of its own.

    Args:
        texts: read once; memory grows with the different words among them, not with their number. WordPiece
            keeps them on disk meanwhile.
        kind: `bpe` (byte-level, as GPT-2: texts come back as they were), `wordpiece` (as BERT) or `unigram`
            (as SentencePiece).
        vocab_size: the most tokens, special ones included.
        lowercase: whether case is dropped first.

    >>> tokenizer = train_tokenizer(["low lower lowest"] * 9, vocab_size=300)
    >>> tokenizer.decode(tokenizer.encode("lower").ids)
    'lower'

    Raises:
        OptionError: an option is out of range; byte-level BPE has 258 tokens at least, and others as many as
            the texts have characters.
    """
    check_choice("train_tokenizer", kind, TOKENIZER_KINDS)
    check_integer("vocab_size", vocab_size, low=258 if kind == "bpe" else 16)
    trained = _TRAINERS[kind](texts, vocab_size, lowercase)
    if (needed := trained.get_vocab_size()) > vocab_size:
        raise _no_room(vocab_size, f", which need {needed} tokens")
    return trained


def _no_room(vocab_size: int, more: str = "") -> OptionError:
    return OptionError(
        f"vocab_size={vocab_size} has no room for the characters of the texts{more}",
        hint="choose more, or bpe, whose tokens are of bytes",
        option="vocab_size",
    )


def _train_bpe(texts: Iterable[str], vocab_size: int, lowercase: bool) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_specials("bpe"),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _train_wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool) -> tokenizers.Tokenizer:
    """The library numbers `##x` as words come out of a hash map, and merges pairs that are as frequent by
    their numbers. So it is trained twice: for the characters alone, and then with those in order."""
    from tokenizers import Tokenizer, models, processors, trainers

    specials = _specials("wordpiece")
    with tempfile.TemporaryFile("w+", encoding="utf-8") as kept:
        first = _wordpiece_of(models.WordPiece(unk_token="[UNK]"), lowercase)
        trainer = trainers.WordPieceTrainer(vocab_size=0, special_tokens=specials, show_progress=False)
        first.train_from_iterator(_kept_in(kept, texts), trainer)
        characters = sorted(first.get_vocab().keys() - set(specials), key=lambda token: (len(token), token))
        kept.seek(0)
        second = _wordpiece_of(models.WordPiece(unk_token="[UNK]"), lowercase)
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=[*specials, *characters], show_progress=False
        )
        second.train_from_iterator(map(json.loads, kept), trainer)
    # Made anew, as the library takes all that was numbered beforehand for special.
    backend = _wordpiece_of(models.WordPiece(second.get_vocab(), unk_token="[UNK]"), lowercase)
    assert isinstance(backend, Tokenizer)
    backend.add_special_tokens(specials)
    ends = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return backend


def _wordpiece_of(model: Any, lowercase: bool) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

    backend = Tokenizer(model)
    steps: list[Any] = [normalizers.BertNormalizer(lowercase=False, strip_accents=False)]
    backend.normalizer = normalizers.Sequence([*steps, *([normalizers.Lowercase()] if lowercase else [])])
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def _kept_in(file: IO[str], texts: Iterable[str]) -> Iterator[str]:
    """The texts, each of which is written as a line of JSON too."""
    for text in texts:
        file.write(json.dumps(text) + "\n")
        yield text


def _train_unigram(texts: Iterable[str], vocab_size: int, lowercase: bool) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    specials = _specials("unigram")
    backend = Tokenizer(models.Unigram())
    steps: list[Any] = [normalizers.NFKC(), *([normalizers.Lowercase()] if lowercase else [])]
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=specials, unk_token="<unk>", show_progress=False
    )
    try:
        backend.train_from_iterator(texts, trainer)
    except Exception as error:  # the library has no kind of its own
        if "not large enough" not in str(error):
            raise
        raise _no_room(vocab_size) from error
    pieces = json.loads(backend.to_str())["model"]["vocab"]
    scores = {piece: score for piece, score in pieces if piece not in specials}
    pieces = [*((special, 0.0) for special in specials), *settle_scores(scores)]
    backend.model = models.Unigram(pieces, specials.index("<unk>"), False)
    return backend


def settle_scores(scores: Mapping[str, float]) -> list[tuple[str, float]]:
    """Pieces with their log probabilities, the likeliest first, free of what differs from one training to the
    next: the last bits of sums, and which of the characters that are no likely pieces has which of the
    scores (the least, and 0.0001 more for each further one) that the library deals out.

    >>> settle_scores({"x": -8.9999, "y": -9.0, "the": -3.00000000001})
    [('the', -3.0), ('x', -9.0), ('y', -9.0)]
    """
    least = min(scores.values(), default=0.0)
    single = sorted((score, piece) for piece, score in scores.items() if len(piece) == 1)
    settled = dict(scores)
    dealt = 0
    for score, piece in single:
        if abs(score - least) < _SAME:
            dealt = max(dealt, 1)
        elif abs(score - least - dealt * _DEALT) < _SAME:
            dealt += 1
        else:
            break
        settled[piece] = least
    rounded = ((piece, round(score, _DIGITS)) for piece, score in settled.items())
    return sorted(rounded, key=lambda item: (-item[1], item[0]))


def _specials(kind: str) -> list[str]:
    return list(dict.fromkeys(_SPECIALS[kind].values()))


_TRAINERS: dict[str, Callable[[Iterable[str], int, bool], tokenizers.Tokenizer]] = {
    "bpe": _train_bpe,
    "wordpiece": _train_wordpiece,
    "unigram": _train_unigram,
}


def save_tokenizer(tokenizer: tokenizers.Tokenizer, kind: str, folder: str | os.PathLike[str]) -> None:
    """Write tokenizer.json and tokenizer_config.json into a folder, which is made: what FastServe and
    `transformers.AutoTokenizer` open."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **_SPECIALS[kind]}
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
