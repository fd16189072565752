"""Reads the tokenizers of folders from before tokenizer.json: vocab.txt, vocab.json with merges.txt, and
models of SentencePiece, each by the rules of the class that tokenizer_config.json names.

Source of the rules: the classes of those names in transformers 5, models/*/tokenization_*.py, and their
converters in convert_slow_tokenizer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from fastserve.checkpoint.file import read_bytes, read_json, read_optional_json
from fastserve.checkpoint.marian_pieces import MARK, read_marian_pieces
from fastserve.checkpoint.sentencepiece import CONTROL, UNKNOWN, SentencePieceModel, read_sentencepiece
from fastserve.checkpoint.sentencepiece_tokenizer import build_from_sentencepiece, piece_tokens
from fastserve.checkpoint.splitting import QWEN2, cut_words
from fastserve.checkpoint.tokenizer_library import ROLES, add_ends, name_errors, special_tokens
from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.types import JsonObject

_PIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_NUM_SENTINELS = 100  # T5's <extra_id_0> and on, behind the pieces
_NUMBER_PENALTY = 100.0  # keeps ALBERT from pieces such as "9,", which its vocabulary has but never uses


@dataclass(frozen=True, slots=True)
class _Parts:
    """A tokenizer without its added tokens, and those that its own files have."""

    backend: Tokenizer
    added: list[AddedToken] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Class:
    """A tokenizer class of transformers."""

    build: Callable[[Path, JsonObject], _Parts]
    roles: Mapping[str, str]  # unless tokenizer_config.json says otherwise
    first: str | None = None  # role of the token before a text
    last: str | None = None  # and behind it
    flags: tuple[bool, bool] = (False, False)  # where add_bos_token and add_eos_token decide: their defaults
    num_between: int | None = None  # of `last` between the texts of a pair; None: each has its own ends
    second_type_id: int = 0
    mask_takes_space: bool = False


def build_from_legacy_files(folder: Path, config: JsonObject) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer, and its special tokens by role. `config` is of tokenizer_config.json.

    Raises:
        CheckpointError: a file is missing, corrupt or inconsistent with another.
        UnsupportedError: there are no such files, or they are of a class that we do not have.
    """
    name = _class_name(folder, config)
    class_ = _CLASSES.get(name or "")
    if class_ is None:
        what = f", and a tokenizer of class {name!r}" if name else ""
        raise UnsupportedError(
            f"{folder} has no tokenizer.json{what}; supported without it are {', '.join(_CLASSES)}",
            hint="transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes it",
        )
    roles = {**class_.roles, **special_tokens(config)}
    with name_errors(folder):
        parts = class_.build(folder, config)
        _add_tokens(parts, class_, roles, folder, config)
        first, last = (roles[role] if role else None for role in _ends(class_, config))
        add_ends(
            parts.backend,
            first,
            last,
            num_between=class_.num_between,
            second_type_id=class_.second_type_id,
        )
    return parts.backend, roles


def build_marian_target(folder: Path) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of the targets of a Marian model whose two sides have a vocabulary each, and its special
    tokens by role.

    Raises:
        CheckpointError: target.spm or target_vocab.json is missing or corrupt.
        UnsupportedError: target.spm is no Unigram model.
    """
    with name_errors(folder):
        parts = _marian_parts(folder, of_target=True)
        known = parts.backend.get_vocab()
        roles = {role: text for role, text in _CLASSES["MarianTokenizer"].roles.items() if text in known}
        special = [AddedToken(text, special=True, normalized=False) for text in roles.values()]
        parts.backend.add_tokens([*parts.added, *special])
    return parts.backend, roles


def _class_name(folder: Path, config: JsonObject) -> str | None:
    model_config = read_optional_json(folder / "config.json")
    named = config.get("tokenizer_class") or model_config.get("tokenizer_class")
    if isinstance(named, str):
        return named.removesuffix("Fast")
    model_type = model_config.get("model_type")
    return _CLASS_OF_MODEL.get(model_type) if isinstance(model_type, str) else None


def _ends(class_: _Class, config: JsonObject) -> tuple[str | None, str | None]:
    if class_.first or class_.last:
        return class_.first, class_.last
    bos, eos = (
        config.get(f"add_{end}_token", default)
        for end, default in zip(("bos", "eos"), class_.flags, strict=True)
    )
    return "bos_token" if bos else None, "eos_token" if eos else None


def _add_tokens(
    parts: _Parts, class_: _Class, roles: Mapping[str, str], folder: Path, config: JsonObject
) -> None:
    """Add the tokens of the tokenizer's own files, those that the folder declares with their ids, and the
    special ones, in this order: each has the next id, unless the vocabulary has it.
    """
    mask = roles.get("mask_token")
    named = [*roles.values(), *_extra_special_tokens(config)]
    tokens = {token.content: token for token in parts.added}
    for text in named:
        lstrip = class_.mask_takes_space and text == mask
        tokens[text] = AddedToken(text, special=True, normalized=False, lstrip=lstrip)
    declared = _declared_tokens(folder, config, special=frozenset(named))
    tokens |= {token.content: token for token in declared.values()}
    by_id = {token.content: id_ for id_, token in declared.items()}
    ordered = sorted(tokens, key=lambda text: by_id.get(text, len(by_id) and max(declared) + 1))
    parts.backend.add_tokens([tokens[text] for text in ordered])
    for id_, token in declared.items():
        found = parts.backend.token_to_id(token.content)
        if found != id_:
            raise CheckpointError(
                f"{folder} declares token {token.content!r} with id {id_}, its vocabulary gives it {found}",
                hint="the files of the tokenizer are not of the same model: download them again",
            )


def _declared_tokens(folder: Path, config: JsonObject, *, special: frozenset[str]) -> dict[int, AddedToken]:
    """The tokens that tokenizer_config.json lists by id, or, in older folders, added_tokens.json."""
    listed = config.get("added_tokens_decoder")
    if isinstance(listed, dict):
        return {_read_id(id_): _read_token(token) for id_, token in listed.items()}
    return {
        _read_id(id_): AddedToken(text, special=text in special, normalized=text not in special)
        for text, id_ in read_optional_json(folder / "added_tokens.json").items()
    }


def _read_id(id_: object) -> int:
    text = str(id_)
    if not text.isdecimal() or len(text) > 9:
        raise CheckpointError(f"an added token has the id {text[:40]!r}, which is none")
    return int(text)


def _read_token(token: object) -> AddedToken:
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise CheckpointError(f"an added token is {str(token)[:80]!r}, which has no content")
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    given = {flag: token[flag] for flag in flags if isinstance(token.get(flag), bool)}
    return AddedToken(token["content"], **given)


def _extra_special_tokens(config: JsonObject) -> list[str]:
    found = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = config.get(key)
        if isinstance(tokens, dict):
            tokens = list(tokens.values())
        for token in tokens if isinstance(tokens, list) else ():
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                found.append(content)
    return found


def _build_byte_level(folder: Path, config: JsonObject) -> _Parts:
    """GPT-2's byte pairs, whose words the library cuts itself."""
    adds_space = bool(config.get("add_prefix_space", False))
    tokenizer = _read_byte_pairs(folder)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=adds_space)
    return _Parts(tokenizer)


def _build_qwen2(folder: Path, config: JsonObject) -> _Parts:
    tokenizer = _read_byte_pairs(folder)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = cut_words([QWEN2])
    return _Parts(tokenizer)


def _read_byte_pairs(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer(
        models.BPE(vocab=dict(read_json(folder / "vocab.json")), merges=_read_merges(folder))
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _read_merges(folder: Path) -> list[tuple[str, str]]:
    merges = []
    for line in _read_lines(folder / "merges.txt"):
        if not line or line.startswith("#version"):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise CheckpointError(f"{folder / 'merges.txt'} merges {line[:80]!r}, which are no two tokens")
        merges.append((left, right))
    return merges


def _read_lines(path: Path) -> list[str]:
    """Lines end by \\n alone: a token may be another character that ends lines."""
    try:
        text = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not valid UTF-8", hint="download the model again") from error
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _build_word_piece(folder: Path, config: JsonObject) -> _Parts:
    vocabulary = {token: id_ for id_, token in enumerate(_read_lines(folder / "vocab.txt"))}
    unknown = special_tokens(config).get("unk_token", "[UNK]")
    if unknown not in vocabulary:
        raise CheckpointError(f"{folder / 'vocab.txt'} lacks {unknown!r}, the token for what is unknown")
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _Parts(tokenizer)


def _build_pieces(folder: Path, config: JsonObject) -> _Parts:
    model = _read_pieces(folder)
    adds_prefix = model.adds_prefix and config.get("add_prefix_space") is not False
    is_legacy = config.get("legacy") is not False
    return _parts_of(replace(model, adds_prefix=adds_prefix, prefixes_parts=is_legacy))


def _build_t5(folder: Path, config: JsonObject) -> _Parts:
    num_sentinels = config.get("extra_ids", _NUM_SENTINELS)
    if not isinstance(num_sentinels, int) or not 0 <= num_sentinels <= 10_000:
        raise CheckpointError(f"{folder} has {num_sentinels!r} extra_ids")
    names = [f"<extra_id_{index}>" for index in reversed(range(num_sentinels))]
    return _parts_of(_with_pieces(_read_pieces(folder), behind=names))


def _build_xlm_roberta(folder: Path, config: JsonObject) -> _Parts:
    """Its ids are those of fairseq, which has four tokens of its own where the file has three."""
    model = _read_pieces(folder)
    if len(model.pieces) < 3:
        raise CheckpointError(f"{folder} has a SentencePiece model of {len(model.pieces)} pieces")
    kept = replace(model, pieces=model.pieces[3:], scores=model.scores[3:], types=model.types[3:])
    roles = {**_CLASSES["XLMRobertaTokenizer"].roles, **special_tokens(config)}
    before = [roles[role] for role in ("bos_token", "pad_token", "eos_token", "unk_token")]
    whole = _with_pieces(kept, before=before, behind=[roles["mask_token"]])
    types = whole.types.copy()
    types[3] = UNKNOWN
    return _parts_of(replace(whole, types=types, unknown_id=3))


def _build_albert(folder: Path, config: JsonObject) -> _Parts:
    model = _read_pieces(folder)
    is_penalized = [len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit() for piece in model.pieces]
    scores = model.scores - np.where(is_penalized, _NUMBER_PENALTY, 0.0).astype(np.float32)
    steps: list[normalizers.Normalizer] = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    if not config.get("keep_accents", False):
        steps += [normalizers.NFKD(), normalizers.StripAccents()]
    if config.get("do_lower_case", True):
        steps += [normalizers.Lowercase()]
    backend = build_from_sentencepiece(replace(model, scores=scores), first_steps=steps)
    return _Parts(backend, piece_tokens(model.pieces, model.types))


def _build_marian(folder: Path, config: JsonObject) -> _Parts:
    return _marian_parts(folder)


def _marian_parts(folder: Path, *, of_target: bool = False) -> _Parts:
    model, codes = read_marian_pieces(folder, of_target=of_target)
    backend = build_from_sentencepiece(model, first_steps=[normalizers.Replace(MARK, "")])
    backend.decoder = decoders.Sequence([decoders.Replace(MARK, ""), backend.decoder])
    languages = [AddedToken(code, normalized=False, special=False) for code in codes]
    return _Parts(backend, [*piece_tokens(model.pieces, model.types), *languages])


def _read_pieces(folder: Path) -> SentencePieceModel:
    path = next((folder / name for name in _PIECE_FILES if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(
            f"{folder} has none of {', '.join(_PIECE_FILES)}", hint="download the model again"
        )
    return read_sentencepiece(path)


def _with_pieces(
    model: SentencePieceModel, *, before: list[str] | None = None, behind: list[str]
) -> SentencePieceModel:
    """The model with control pieces before and behind its own."""
    before = before or []
    return replace(
        model,
        pieces=[*before, *model.pieces, *behind],
        scores=np.pad(model.scores, (len(before), len(behind))),
        types=np.pad(model.types, (len(before), len(behind)), constant_values=CONTROL),
    )


def _parts_of(model: SentencePieceModel) -> _Parts:
    return _Parts(build_from_sentencepiece(model), piece_tokens(model.pieces, model.types))


def _same(text: str, *roles: str) -> dict[str, str]:
    return dict.fromkeys(roles, text)


_BERT = _Class(
    build=_build_word_piece,
    roles={
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    },
    first="cls_token",
    last="sep_token",
    num_between=1,
    second_type_id=1,
)
_FAIRSEQ_ROLES = {
    **_same("<s>", "bos_token", "cls_token"),
    **_same("</s>", "eos_token", "sep_token"),
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_ROBERTA = _Class(
    build=_build_byte_level,
    roles=_FAIRSEQ_ROLES,
    first="cls_token",
    last="sep_token",
    num_between=2,
    mask_takes_space=True,
)
_LLAMA = _Class(
    build=_build_pieces,
    roles={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    flags=(True, False),
)
_CLASSES = {
    "GPT2Tokenizer": _Class(
        build=_build_byte_level, roles=_same("<|endoftext|>", "bos_token", "eos_token", "unk_token")
    ),
    "Qwen2Tokenizer": _Class(
        build=_build_qwen2, roles=_same("<|endoftext|>", "eos_token", "unk_token", "pad_token")
    ),
    "RobertaTokenizer": _ROBERTA,
    "BartTokenizer": _ROBERTA,
    "BertTokenizer": _BERT,
    "DistilBertTokenizer": _BERT,
    "ElectraTokenizer": _BERT,
    "MPNetTokenizer": replace(
        _ROBERTA, build=_build_word_piece, roles={**_FAIRSEQ_ROLES, "unk_token": "[UNK]"}
    ),
    "LlamaTokenizer": _LLAMA,
    "GemmaTokenizer": replace(
        _LLAMA,
        roles={"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
    ),
    "T5Tokenizer": _Class(
        build=_build_t5,
        roles={"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        last="eos_token",
    ),
    "MarianTokenizer": _Class(
        build=_build_marian,
        roles={"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        last="eos_token",
    ),
    "AlbertTokenizer": replace(
        _BERT,
        build=_build_albert,
        roles={
            **_BERT.roles,
            **_same("[CLS]", "bos_token"),
            **_same("[SEP]", "eos_token"),
            "unk_token": "<unk>",
            "pad_token": "<pad>",
        },
        mask_takes_space=True,
    ),
    "XLMRobertaTokenizer": replace(_ROBERTA, build=_build_xlm_roberta),
}
assert all(role in ROLES for class_ in _CLASSES.values() for role in class_.roles)

# The class where no file names one.
_CLASS_OF_MODEL = {
    "albert": "AlbertTokenizer",
    "bart": "BartTokenizer",
    "bert": "BertTokenizer",
    "marian": "MarianTokenizer",
    "distilbert": "DistilBertTokenizer",
    "electra": "ElectraTokenizer",
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "gpt2": "GPT2Tokenizer",
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
    "mixtral": "LlamaTokenizer",
    "mpnet": "MPNetTokenizer",
    "phi3": "LlamaTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen2_moe": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "roberta": "RobertaTokenizer",
    "t5": "T5Tokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
}
