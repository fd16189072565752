"""Which files of an archive or a repository are the model, and which are not needed to run it."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from fastserve.errors import DownloadError

_WEIGHTS = ("*.gguf", "*.safetensors")
_BESIDE_WEIGHTS = (
    "*.safetensors.index.json",
    "config.json",
    "fastserve.json",
    "fastserve.safetensors",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "target_vocab.json",
    "chat_template.jinja",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "LICENSE*",
    "NOTICE*",
)


def choose_payload(names: Iterable[str]) -> dict[str, str]:
    """Pick the model among the files of an archive or repository: from path in the model folder to name in
    `names`.

    The model is in the shallowest folder with a .gguf file, or with .safetensors beside a config.json. Where
    a folder has both kinds, safetensors win; where it has `model*.safetensors`, other .safetensors (the same
    weights under another tool's names) stay out. The result is empty where there is no model.

    >>> choose_payload(["pkg/__init__.py", "pkg/model/config.json", "pkg/model/model.safetensors"])
    {'config.json': 'pkg/model/config.json', 'model.safetensors': 'pkg/model/model.safetensors'}

    Raises:
        DownloadError: there are several .gguf files to choose from.
    """
    names = sorted(names)
    root = _model_folder(names)
    if root is None:
        return {}
    inside = {name[len(root) :]: name for name in names if name.startswith(root)}
    weights = _choose_weights([path for path in inside if _matches(path, _WEIGHTS)])
    return {path: name for path, name in inside.items() if path in weights or _matches(path, _BESIDE_WEIGHTS)}


def _model_folder(names: list[str]) -> str | None:
    """The prefix of the model's files, "" or ending in a slash."""
    everything = set(names)
    found = set()
    for name in names:
        folder = name[: name.rfind("/") + 1]
        if name.endswith(".gguf") or (name.endswith(".safetensors") and f"{folder}config.json" in everything):
            found.add(folder)
    return min(found, key=lambda folder: (folder.count("/"), folder), default=None)


def _choose_weights(weights: list[str]) -> set[str]:
    safetensors = [path for path in weights if path.endswith(".safetensors")]
    standard = [path for path in safetensors if path.startswith("model")]
    if safetensors:
        return set(standard or safetensors)
    if len(weights) > 1:
        raise DownloadError(
            f"there are {len(weights)} .gguf files to choose from: {', '.join(weights)}",
            hint="name the one you want: hf:owner/name/FILE.gguf",
        )
    return set(weights)


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether the path, folders included, is one of the patterns; `*` stays within the top folder."""
    depth = len(PurePosixPath(path).parts)
    return any(depth == len(PurePosixPath(p).parts) and fnmatchcase(path, p) for p in patterns)
