"""Which tokens end a completion."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fastserve.checkpoint.file import read_optional_json
from fastserve.checkpoint.gguf import GgufMetadata
from fastserve.errors import CheckpointError
from fastserve.types import JsonObject

# Tokens that close a turn in the chat formats in use (llama.cpp recognizes the same, llama-vocab.cpp). One
# counts only where the model's own template writes it.
_END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "<|eom_id|>",
    "<|eot|>",
)


def eos_ids_of_folder(folder: Path, config: JsonObject, template: str | None) -> tuple[int, ...]:
    """Of generation_config.json, else config.json; the tokenizer's own eos token; the template's end of turn.

    Raises:
        CheckpointError: an id is not a whole number.
    """
    generation = read_optional_json(folder / "generation_config.json")
    stored = generation.get("eos_token_id", config.get("eos_token_id"))
    found = list(stored) if isinstance(stored, list) else [stored]
    tokenizer = read_optional_json(folder / "tokenizer_config.json")
    added = tokenizer.get("added_tokens_decoder")
    if isinstance(added, dict):
        ids = {entry["content"]: int(id_) for id_, entry in added.items() if _is_added_token(id_, entry)}
        found += [ids.get(text) for text in (_text_of(tokenizer.get("eos_token")), *_end_of_turn(template))]
    return _checked_ids(folder, found)


def eos_ids_of_gguf(metadata: GgufMetadata) -> tuple[int, ...]:
    """Of the metadata (end of text, of turn, of message), and the end of turn of the chat template.

    Raises:
        CheckpointError: an id is not a whole number.
    """
    found = [metadata.integer(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    tokens = metadata.texts("tokenizer.ggml.tokens") or ()
    known = {tokens[id_] for id_ in found if id_ is not None and 0 <= id_ < len(tokens)}
    wanted = set(_end_of_turn(metadata.text("tokenizer.chat_template"))) - known
    if wanted:  # only then: it decodes the whole vocabulary
        found += [id_ for id_, token in enumerate(tokens) if token in wanted]
    return _checked_ids(metadata.path, found)


def _end_of_turn(template: str | None) -> list[str]:
    return [text for text in _END_OF_TURN if template is not None and text in template]


def _is_added_token(id_: str, entry: object) -> bool:
    return (
        id_.isascii() and id_.isdigit() and isinstance(entry, dict) and isinstance(entry.get("content"), str)
    )


def _text_of(token: object) -> str | None:
    """A token of tokenizer_config.json is a text, or an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _checked_ids(path: Path, found: Iterable[object]) -> tuple[int, ...]:
    ids = [id_ for id_ in found if id_ is not None]
    wrong = [id_ for id_ in ids if type(id_) is not int or id_ < 0]
    if wrong:
        raise CheckpointError(f"{path}: eos_token_id is {wrong[0]!r:.80}, a whole number was expected")
    return tuple(sorted({id_ for id_ in ids if isinstance(id_, int)}))
