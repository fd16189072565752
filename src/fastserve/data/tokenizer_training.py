"""Training of subword tokenizers on texts: byte-level BPE, WordPiece, Unigram."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve.option import check_choice, check_integer

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_KINDS = ("bpe", "wordpiece", "unigram")
DEFAULT_VOCAB_SIZE = 8000

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
    """Train a tokenizer, which `save_tokenizer` writes as models have it.

    Args:
        texts: read once; memory grows with the different words among them, not with their number.
        kind: `bpe` (byte-level, as GPT-2: texts come back as they were), `wordpiece` (as BERT) or `unigram`
            (as SentencePiece).
            Training `bpe` again gives the same; the library's trainers of the others draw, without a seed.
        vocab_size: the most tokens, special ones included.
        lowercase: whether case is dropped first.

    >>> tokenizer = train_tokenizer(["low lower lowest"] * 9, vocab_size=300)
    >>> tokenizer.decode(tokenizer.encode("lower").ids)
    'lower'

    Raises:
        OptionError: an option is out of range; byte-level BPE has 258 tokens at least.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    check_choice("train_tokenizer", kind, TOKENIZER_KINDS)
    check_integer("vocab_size", vocab_size, low=258 if kind == "bpe" else 16)
    specials = list(dict.fromkeys(_SPECIALS[kind].values()))
    steps: list[Any] = [normalizers.Lowercase()] if lowercase else []
    if kind == "bpe":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=specials,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
    elif kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        steps.insert(0, normalizers.BertNormalizer(lowercase=False, strip_accents=False))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=specials, show_progress=False
        )
    else:
        backend = Tokenizer(models.Unigram())
        steps.insert(0, normalizers.NFKC())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=vocab_size, special_tokens=specials, unk_token="<unk>", show_progress=False
        )
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    backend.train_from_iterator(texts, trainer)
    if kind == "wordpiece":
        ends = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
        )
    return backend


def save_tokenizer(tokenizer: tokenizers.Tokenizer, kind: str, folder: str | os.PathLike[str]) -> None:
    """Write tokenizer.json and tokenizer_config.json into a folder, which is made: what FastServe and
    `transformers.AutoTokenizer` open."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **_SPECIALS[kind]}
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
