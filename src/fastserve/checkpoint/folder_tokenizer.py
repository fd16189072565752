"""Reads the tokenizer of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from fastserve.checkpoint.file import read_bytes, read_optional_json
from fastserve.checkpoint.sequence_ends import add_ends
from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.types import JsonObject

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def build_from_folder(folder: Path) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of tokenizer.json, and the special tokens of tokenizer_config.json by role.

    Raises:
        CheckpointError: a file is corrupt.
        UnsupportedError: there is no tokenizer.json.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UnsupportedError(
            f"{folder} has no tokenizer.json, the only form of tokenizer supported in a folder",
            hint="transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes it",
        )
    text = read_bytes(path)
    try:
        backend = Tokenizer.from_buffer(text)
    except Exception as error:  # the library raises nothing more precise
        raise CheckpointError(
            f"{path} is no valid tokenizer: {error}", hint="download the model again"
        ) from error
    config = read_optional_json(folder / "tokenizer_config.json")
    special_tokens = _special_tokens({**read_optional_json(folder / "special_tokens_map.json"), **config})
    if "add_bos_token" in config or "add_eos_token" in config:
        # These decide instead of tokenizer.json: TokenizersBackend of transformers 5.
        bos = special_tokens.get("bos_token") if config.get("add_bos_token") else None
        eos = special_tokens.get("eos_token") if config.get("add_eos_token") else None
        add_ends(backend, bos, eos)
    return backend, special_tokens


def _special_tokens(named: JsonObject) -> dict[str, str]:
    """A special token is a text, or an object with its content."""
    found = {}
    for role in _ROLES:
        token = named.get(role)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            found[role] = content
    return found
