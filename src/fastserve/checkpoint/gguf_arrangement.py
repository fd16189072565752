"""What conversion to GGUF moves about in tensors, and back: rows in another order, other numbers, matrices
the other way round.

Source: modify_tensors of the models in convert_hf_to_gguf.py of ggml-org/llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.tensor import ComputedTensor, StoredTensor, TensorFormat
from fastserve.checkpoint.view import Change, rows_in_order, shifted, transposed, transposed_back
from fastserve.errors import CheckpointError
from fastserve.types import JsonObject

Order = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Arrangement:
    """Of the tensors whose Hugging Face name matches `pattern`.

    Attributes:
        order: given the name, the number of rows and the config, which rows GGUF has: the indices of those of
            the Hugging Face tensor. None: all of them, as they are.
        there, back: of tensors: the change that conversion makes before rows are ordered, and its inverse.
    """

    pattern: str
    order: Callable[[str, int, JsonObject], Order | None] = lambda name, rows, config: None
    there: Change | None = None
    back: Change | None = None


def change_there(name: str, tensor: StoredTensor, config: JsonObject) -> tuple[StoredTensor, Order | None]:
    """A tensor of a model as GGUF has it, but for its rows, of which it has those of the order.

    Raises:
        CheckpointError: it has a number of rows that cannot be.
        UnsupportedError: it is stored in blocks that cannot be turned.
    """
    order: Order | None = None
    for arrangement in _find(name, config):
        tensor = tensor if arrangement.there is None else arrangement.there(tensor)
        rows = tensor.shape[0] if tensor.shape else 1
        order = arrangement.order(name, rows, config)
    return tensor, order


def change_back(name: str, config: JsonObject) -> Change | None:
    """How a tensor of a GGUF file becomes that of the Hugging Face model; None: it is as it is."""
    found = _find(name, config)
    if not found:
        return None

    def change(tensor: StoredTensor) -> StoredTensor:
        rows = tensor.shape[0] if tensor.shape else 1
        for arrangement in found:
            if (order := arrangement.order(name, rows, config)) is not None:
                tensor = rows_in_order(tensor, np.argsort(order))
            tensor = tensor if arrangement.back is None else arrangement.back(tensor)
        return tensor

    return change


def num_padding_rows(config: JsonObject) -> int:
    """Of RoBERTa's positions: those up to the padding token's, which is 1 where the config does not say."""
    pad_token_id = config.get("pad_token_id")
    return 2 if pad_token_id is None else int(pad_token_id) + 1


def _find(name: str, config: JsonObject) -> list[_Arrangement]:
    of_model = _ARRANGED.get(str(config["model_type"]), ())
    return [arrangement for arrangement in of_model if re.search(arrangement.pattern, name)]


def _in_pairs(name: str, rows: int, config: JsonObject) -> Order:
    """Rows of Llama's q and k, (head, element of the pair, pair), become (head, pair, element of the pair),
    for a rotary embedding that turns neighbours."""
    heads = config["num_attention_heads"]
    count = heads if ".q_proj." in name else config.get("num_key_value_heads") or heads
    if rows % (2 * count):
        raise CheckpointError(f"{name} has {rows} rows, a multiple of {2 * count} was expected")
    return np.arange(rows).reshape(count, 2, -1).swapaxes(1, 2).ravel()


def _by_part(name: str, rows: int, config: JsonObject) -> Order:
    """Rows of GPT-NeoX's fused matrix, (head, q/k/v, dimension), become (q/k/v, head, dimension)."""
    heads = config["num_attention_heads"]
    if rows % (3 * heads):
        raise CheckpointError(f"{name} has {rows} rows, a multiple of {3 * heads} was expected")
    return np.arange(rows).reshape(heads, 3, -1).swapaxes(0, 1).ravel()


def _behind_padding(name: str, rows: int, config: JsonObject) -> Order:
    """Rows of RoBERTa's positions up to the padding token's are for padding, and have no place."""
    return np.arange(num_padding_rows(config), rows)


def _plus_one(tensor: StoredTensor) -> StoredTensor:
    """Weights of Gemma's norms are stored less 1, and are there as they are multiplied with."""

    def read(begin: int, end: int) -> NDArray[np.uint8]:
        return (to_f32(tensor.rows(begin, end)) + np.float32(1)).view(np.uint8)

    return ComputedTensor(tensor.name, TensorFormat.F32, tensor.shape, read)


_LLAMA = (_Arrangement(r"\.[qk]_proj\.(weight|bias)$", order=_in_pairs),)
# What the graph adds up again is what is stored: exactly for 0.5 and more, within half a float32 step of 1
# for less.
_GEMMA = (_Arrangement(r"norm\.weight$", there=_plus_one, back=partial(shifted, offset=-1.0)),)
_ROBERTA = (_Arrangement(r"\bposition_embeddings\.weight$", order=_behind_padding),)
# By model_type. A RoBERTa is read as the BERT that it is without the rows for padding.
_ARRANGED: Mapping[str, tuple[_Arrangement, ...]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "smollm3": _LLAMA,
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": (_Arrangement(r"\.c_(attn|proj|fc)\.weight$", there=transposed, back=transposed_back),),
    "gpt_neox": (_Arrangement(r"\.query_key_value\.(weight|bias)$", order=_by_part),),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}
