"""A model on disk, opened: its configuration, its tensors by Hugging Face name, and what generation needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fastserve.checkpoint.archive_expansion import expand_archive, is_archive
from fastserve.checkpoint.ending import eos_ids_of_folder, eos_ids_of_gguf
from fastserve.checkpoint.file import read_bytes, read_json, read_optional_json
from fastserve.checkpoint.gguf import GgufMetadata, read_gguf
from fastserve.checkpoint.gguf_config import config_from_gguf
from fastserve.checkpoint.gguf_model import HfTensors
from fastserve.checkpoint.packed_weights import PACKED_FILE
from fastserve.checkpoint.quantization import assemble, is_quantized
from fastserve.checkpoint.safetensors import Part, read_safetensors, read_sharded_safetensors
from fastserve.checkpoint.sentence import (
    SentenceSettings,
    read_sentence_settings,
    sentence_settings_from_gguf,
)
from fastserve.checkpoint.tensor import StoredTensor
from fastserve.errors import CheckpointError, ModelNotFoundError, UnsupportedError
from fastserve.types import JsonObject

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model on disk. Tensors are views of mapped files: bytes are read when they are used."""

    path: Path  # the folder, or the .gguf file
    format: Literal["safetensors", "gguf"]
    config: JsonObject  # as in config.json; made from the metadata of a GGUF file
    tensors: Mapping[str, StoredTensor]  # by Hugging Face parameter name
    eos_token_ids: tuple[int, ...]  # tokens that end a completion, sorted
    chat_template: str | None  # jinja source
    sentence: SentenceSettings | None  # of sentence-transformers models
    metadata: GgufMetadata | None  # of a GGUF file: its tokenizer is in there
    card: JsonObject = field(default_factory=dict)  # fastserve.json; empty where there is none

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that decide what the tensors are: those that they may be in, and the config where it says
        how they are quantized.
        """
        if self.format == "gguf":
            return (self.path,)
        config = (self.path / "config.json",) if is_quantized(self.config) else ()
        return (*sorted(self.path.glob("*.safetensors")), *config)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model: a Hugging Face folder with safetensors, a folder with one .gguf file, or that file.

    Safetensors with their config.json win over a .gguf file beside them. An archive of ours is expanded into
    the store, once, and opened there.

    >>> checkpoint = open_checkpoint(Path("models/smollm2"))  # doctest: +SKIP
    >>> checkpoint.tensors["model.norm.weight"].shape  # doctest: +SKIP
    (576,)

    Raises:
        ModelNotFoundError: there is no such file or folder.
        CheckpointError: files are missing, truncated or inconsistent.
        UnsupportedError: a format, architecture or tensor type that we do not have; an archive without
            constriction.
        DownloadError: the store has no room for what an archive stands for.
    """
    if not path.exists():
        raise ModelNotFoundError(f"there is no file or folder {path}")
    if path.is_file():
        return _open_file(path)
    if is_archive(path):
        path = expand_archive(path)
    gguf_files = sorted(path.glob("*.gguf"))
    safetensors_files = sorted(path.glob("*.safetensors"))
    # Sources often add a GGUF conversion beside their own files: config.json says which is the model.
    if safetensors_files and (not gguf_files or (path / "config.json").is_file()):
        return open_folder(path, lambda config: assemble(path, config, _read_parts(path, safetensors_files)))
    if len(gguf_files) == 1 and not safetensors_files:
        return _open_file(gguf_files[0])
    if gguf_files:
        names = ", ".join(file.name for file in gguf_files + safetensors_files)
        raise CheckpointError(f"{path} holds several models: {names}", hint="name one of the .gguf files")
    _refuse_pickle(sorted(path.iterdir()))
    if "ensemble" in read_optional_json(path / "fastserve.json"):
        raise UnsupportedError(f"{path} is an ensemble of models", hint="name one of the folders in it")
    raise CheckpointError(
        f"{path} holds no model", hint="expected are config.json with *.safetensors, or one .gguf file"
    )


def _open_file(path: Path) -> Checkpoint:
    _refuse_pickle([path])
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} lacks its config.json", hint=f"name its folder instead: {path.parent}")
    file = read_gguf(path)
    config = config_from_gguf(file)
    return Checkpoint(
        path=path,
        format="gguf",
        config=config,
        tensors=HfTensors(file, config),
        eos_token_ids=eos_ids_of_gguf(file.metadata),
        chat_template=file.metadata.text("tokenizer.chat_template"),
        sentence=sentence_settings_from_gguf(file.metadata),
        metadata=file.metadata,
    )


def open_folder(folder: Path, read_tensors: Callable[[JsonObject], Mapping[str, StoredTensor]]) -> Checkpoint:
    """Open a Hugging Face folder whose tensors `read_tensors` gives. Raises as `open_checkpoint`."""
    config = read_json(folder / "config.json")
    template = _read_chat_template(folder)
    return Checkpoint(
        path=folder,
        format="safetensors",
        config=config,
        tensors=read_tensors(config),
        eos_token_ids=eos_ids_of_folder(folder, config, template),
        chat_template=template,
        sentence=read_sentence_settings(folder),
        metadata=None,
        card=read_optional_json(folder / "fastserve.json"),
    )


def _read_parts(folder: Path, files: list[Path]) -> Mapping[str, Part]:
    """The order is that of transformers: model.safetensors, its index, and then a single file of any name.
    What is packed is read where the config says so (`quantization.py`)."""
    files = [file for file in files if file.name != PACKED_FILE]
    whole = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if whole in files:
        return read_safetensors(whole)
    if index.is_file():
        return read_sharded_safetensors(index)
    if len(files) == 1:
        return read_safetensors(files[0])
    if not files:
        return {}
    raise CheckpointError(
        f"{folder} has {len(files)} .safetensors files and no {index.name} that says what is in which",
        hint="download the model again, its index included",
    )


def _read_chat_template(folder: Path) -> str | None:
    """chat_template.jinja, or `chat_template` of tokenizer_config.json (of several: the default one)."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _decode(path, read_bytes(path))
    template = read_optional_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{folder}: chat_template of tokenizer_config.json is no text")
    return template


def _decode(path: Path, text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not valid UTF-8") from error


def _refuse_pickle(files: Iterable[Path]) -> None:
    for file in files:
        if file.suffix in PICKLE_SUFFIXES:
            raise UnsupportedError(
                f"{file} is a pickle, which can run any code when it is opened: not supported",
                hint="write its numbers alone: "
                f"`fastserve convert {file.parent} --allow-pickle --to safetensors --output DIR`",
            )
