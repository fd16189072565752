"""What a sentence-transformers folder says about its embeddings, read from its several small files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastserve.checkpoint.file import read_json, read_json_list, read_optional_json
from fastserve.checkpoint.gguf import GgufMetadata
from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.types import JsonObject

GGUF_POOLING = {1: "mean", 2: "cls", 3: "lasttoken"}  # enum llama_pooling_type of llama.h; 0 is none
POOLING_FLAGS = {  # as older versions of sentence-transformers write a way of pooling
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SentenceSettings:
    """The chain of modules and the settings of its pooling, as in the files; `models` interprets them."""

    modules: tuple[JsonObject, ...]  # of modules.json, in order
    pooling: JsonObject  # config.json of the pooling module
    max_tokens: int | None  # longest input the model was made for, special tokens included; None: its context


def read_sentence_settings(folder: Path) -> SentenceSettings | None:
    """Read modules.json and the files it points to; None where there is no modules.json.

    Raises:
        CheckpointError: a file is missing or malformed.
        UnsupportedError: the model changes its texts before they are tokenized.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return None
    modules = read_json_list(path)
    pooling: JsonObject = {}
    for module in modules:
        if not isinstance(module.get("type"), str) or not isinstance(module.get("path"), str):
            raise CheckpointError(f"{path} has a module without type or path: {module!s:.80}")
        if module["type"].endswith(".Pooling"):
            pooling = read_json(_inside(folder, module["path"]) / "config.json")
    settings = read_optional_json(folder / "sentence_bert_config.json")
    _refuse_text_changes(folder, settings)
    max_tokens = settings.get("max_seq_length")
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise CheckpointError(f"{folder}: max_seq_length is {max_tokens!r}, a positive integer was expected")
    return SentenceSettings(modules=tuple(modules), pooling=pooling, max_tokens=max_tokens)


def sentence_settings_from_gguf(metadata: GgufMetadata) -> SentenceSettings | None:
    """The settings of an encoder in GGUF, or None where it names no pooling.

    The format does not say whether embeddings are scaled to length 1. They are, as llama.cpp does by default.

    Raises:
        UnsupportedError: a way of pooling that has no name in sentence-transformers.
    """
    kind = metadata.integer(f"{metadata.text('general.architecture')}.pooling_type")
    if kind is None or kind == 0:
        return None
    if kind not in GGUF_POOLING:
        raise UnsupportedError(
            f"{metadata.path} has pooling type {kind}, supported are"
            f" {', '.join(f'{code} ({name})' for code, name in GGUF_POOLING.items())}"
        )
    chain = ("Transformer", "Pooling", "Normalize")
    return SentenceSettings(
        modules=tuple({"type": f"sentence_transformers.models.{name}", "path": ""} for name in chain),
        pooling={"pooling_mode": GGUF_POOLING[kind]},
        max_tokens=None,
    )


def _inside(folder: Path, relative: str) -> Path:
    if not (folder / relative).resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{folder}: modules.json names {relative!r}, which lies outside the model")
    return folder / relative


def _refuse_text_changes(folder: Path, settings: JsonObject) -> None:
    """Refuse what changes a text before it is tokenized: ignoring it would silently give other embeddings."""
    prompt = read_optional_json(folder / "config_sentence_transformers.json").get("default_prompt_name")
    if prompt is not None:
        raise UnsupportedError(
            f"{folder} puts its prompt {prompt!r} before every text, which is not supported"
        )
    if settings.get("do_lower_case") is True:
        raise UnsupportedError(f"{folder}: do_lower_case of sentence_bert_config.json is not supported")
