"""Tiny random models with heads, made by `transformers`, as folders that it and we open."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tiny_models import BERT_CONFIG

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_MARKERS = ["[E1]", "[/E1]", "[E2]", "[/E2]"]
_LETTERS = string.ascii_lowercase + string.digits
_WORDS = ["the", "cat", "sat", "london", "ada", "love", "##lace", "was", "born", "in", "who", "good", "bad"]
_PUNCTUATION = [".", ",", "?", "!", "-", "(", ")"]
_HAN = list("北京是中国的首都")
VOCABULARY = [
    *_SPECIAL,
    *_MARKERS,
    *_LETTERS,
    *(f"##{c}" for c in _LETTERS),
    *_WORDS,
    *_PUNCTUATION,
    *_HAN,
]


def randomize(model: Any, *, seed: int = 0) -> Any:
    """Give all parameters random values, biases and norms too; in eval mode."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = "norm.weight" in name.lower()
            parameter.normal_(float(is_scale), std=parameter.shape[-1] ** -0.5, generator=generator)
    return model.eval()


def save_bert_head(folder: Path, ending: str, **options: Any) -> Path:
    """A random `Bert{ending}` with a tokenizer of letters and a few words; options as of `_save`."""
    from transformers import BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab=str(vocabulary), do_lower_case=True)
    return _save(folder, BERT_CONFIG, ending, tokenizer, **options)


def save_roberta_head(folder: Path, ending: str, **options: Any) -> Path:
    """A random `Roberta{ending}` with a tokenizer of pairs of bytes; options as of `_save`."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    library = ByteLevelBPETokenizer(add_prefix_space=True)
    library.train_from_iterator(
        [" ".join(_WORDS), "".join(_HAN)] * 2, vocab_size=300, special_tokens=special, min_frequency=1
    )
    model = json.loads(library.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = RobertaTokenizer(vocab=model["vocab"], merges=merges, add_prefix_space=True)
    fields = {**BERT_CONFIG, "model_type": "roberta", "max_position_embeddings": 130}
    return _save(folder, fields, ending, tokenizer, **options)


def _save(
    folder: Path,
    fields: dict[str, Any],
    ending: str,
    tokenizer: Any,
    *,
    labels: Sequence[str] = (),
    card: Any = None,
    seed: int = 0,
    **options: Any,
) -> Path:
    """A random model of a head, with a tokenizer; `card` is its fastserve.json, `options` of its config."""
    import torch
    import transformers

    tokenizer.add_special_tokens({"additional_special_tokens": _MARKERS})
    if labels:
        options["id2label"] = dict(enumerate(labels))
        options["label2id"] = {label: index for index, label in enumerate(labels)}
    fields = {**fields, "vocab_size": len(tokenizer), **options}
    config = transformers.AutoConfig.for_model(**fields)
    model = randomize(getattr(transformers, f"AutoModel{ending}").from_config(config), seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("classifier.weight", "classifier.out_proj.weight", "qa_outputs.weight")):
                parameter.mul_(4)  # so that the likeliest label is not one among equals
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.txt").unlink(missing_ok=True)
    if card is not None:
        (folder / "fastserve.json").write_text(json.dumps(card))
    return folder


def open_with_transformers(folder: Path, ending: str) -> tuple[Any, Any]:
    """The model and the tokenizer of a folder."""
    import transformers

    model = getattr(transformers, f"AutoModel{ending}").from_pretrained(folder)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def run_with_transformers(model: Any, encoded: Any) -> dict[str, np.ndarray]:
    """The logits of a batch that its tokenizer has made."""
    import torch

    with torch.no_grad():
        output = model(**{name: torch.tensor(values) for name, values in encoded.items()})
    return {name: value.numpy() for name, value in output.items()}


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)
