"""A Hugging Face model in GGUF terms: metadata, and tensors that are config there. The inverse of
`gguf_config`; names and order of tensors are in `gguf_modules` and `gguf_arrangement`.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.gguf_arrangement import num_padding_rows
from fastserve.checkpoint.gguf_config import LONGROPE_FACTORS, ROPE_FREQS, llama3_factors
from fastserve.checkpoint.gguf_family import FAMILIES, GgufFamily
from fastserve.checkpoint.gguf_writer import WrittenValue
from fastserve.checkpoint.sentence import GGUF_POOLING, POOLING_FLAGS
from fastserve.checkpoint.tensor import ComputedTensor, StoredTensor, TensorFormat
from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.types import JsonObject

# Keys that say how the source file was written, and not what the model is.
_OF_THE_FILE = ("general.alignment", "general.file_type", "general.quantization_version")
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION of ggml.h
_FLOAT_KEY = re.compile(r"epsilon|softcapping|freq_base|factor")  # where a config may have a whole number
# Of rope parameters, what is said in GGUF, or means nothing beside it; the others must be null.
_SAID_OF_ROPE = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "finetuned",
    *LONGROPE_FACTORS,
}
# What llama.cpp has of YaRN in its code: nothing needs to be said of these.
_USUAL_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
_SAID_OF_LLAMA3 = {"low_freq_factor", "high_freq_factor"}


def family_of(checkpoint: Checkpoint) -> GgufFamily:
    """How the model's family is said in GGUF.

    Raises:
        UnsupportedError: it is not, or the model has a head that is not.
    """
    config = checkpoint.config
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise UnsupportedError(
            f"{checkpoint.path} has architecture {config.get('model_type')!r}, written as GGUF are"
            f" {', '.join(FAMILIES)}",
            hint="use --to safetensors or --to compressed-tensors",
        )
    named = config.get("architectures")
    for name in named if isinstance(named, list) else ():
        if str(name).endswith("ForSequenceClassification") and family.rope != "none":
            raise _cannot_say(checkpoint, f"a head of classes ({name})")
    return family


def export_metadata(checkpoint: Checkpoint) -> dict[str, WrittenValue]:
    """The metadata of a model, its tokenizer included; those of a GGUF file are copied.

    Raises:
        CheckpointError: a value of the config is no number where it has to be one.
        UnsupportedError: the family, a variation of it, or the tokenizer cannot be said in GGUF.
    """
    version: dict[str, WrittenValue] = {"general.quantization_version": _QUANTIZATION_VERSION}
    if checkpoint.metadata is not None:
        return {k: v for k, v in checkpoint.metadata.items() if k not in _OF_THE_FILE} | version
    from fastserve.checkpoint.gguf_tokenizer_export import export_tokenizer

    family, config = family_of(checkpoint), settled_config(checkpoint)
    _check(checkpoint, family, config)
    found = {key: _first(config, names) for key, names in family.keys.items()}
    for key, value in found.items():
        if value is not None and not isinstance(value, int | float):
            raise CheckpointError(
                f"{checkpoint.path} has {family.keys[key]}={value!r:.80} in its config, a number was expected"
            )
    found |= _rope_metadata(checkpoint, family, config)
    if "attention.layer_norm_rms_epsilon" not in found:  # an encoder but for GPT-2 and GPT-NeoX
        is_encoder = family.architecture in ("bert", "modern-bert")
        found |= {"attention.causal": False, "pooling_type": _pooling_type(checkpoint)} if is_encoder else {}
    general: dict[str, WrittenValue] = {
        "general.architecture": family.architecture,
        "general.name": checkpoint.path.name,
    }
    own = {
        key if key.startswith("tokenizer.") else f"{family.architecture}.{key}": _number(key, value)
        for key, value in found.items()
        if value is not None
    }
    return {**general, **version, **own, **export_tokenizer(checkpoint)}


def settled_config(checkpoint: Checkpoint) -> JsonObject:
    """A config with what it leaves out: what follows from the rest, and what its family has by default."""
    family, config = FAMILIES[str(checkpoint.config["model_type"])], checkpoint.config
    config = {**family.defaults, **config, **family.fixed}
    if family.keys.get("attention.key_length") == "head_dim" and not config.get("head_dim"):
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    if config["model_type"] == "gpt2" and config["n_inner"] is None:
        config["n_inner"] = 4 * config["n_embd"]
    if config["model_type"] in ("roberta", "xlm-roberta"):  # rows for padding have no place
        config["max_position_embeddings"] -= num_padding_rows(config)
    return config


def extra_tensors(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """What GGUF has as a tensor and Hugging Face in its config, under GGUF's name."""
    if checkpoint.metadata is not None:
        return {}
    family, config = FAMILIES[str(checkpoint.config["model_type"])], settled_config(checkpoint)
    if family.rope == "none":
        return _scaled_head(checkpoint)
    rope = _rope(family, config)
    if rope["rope_type"] == "llama3":
        return {ROPE_FREQS: _vector(ROPE_FREQS, llama3_factors(rope, config["head_dim"]))}
    if rope["rope_type"] == "longrope":
        return {name: _vector(name, rope[key]) for key, name in LONGROPE_FACTORS.items()}
    return {}


def window_that_is_ignored(checkpoint: Checkpoint) -> int | None:
    """Tokens of a window that llama.cpp does not have in this family; None where there is none."""
    family, config = family_of(checkpoint), checkpoint.config
    window: int | None = config.get("sliding_window") if family.ignores_window else None
    return window if window and window < config["max_position_embeddings"] else None


def _check(checkpoint: Checkpoint, family: GgufFamily, config: JsonObject) -> None:
    for key, values in family.only.items():
        if key in config and config[key] not in values:
            raise _cannot_say(checkpoint, f"{key}={config[key]!r}")
    for key in family.required:
        if config.get(key) is None:
            raise _cannot_say(checkpoint, f"{key}={config.get(key)!r}")
    if family.largest is not None:
        is_largest = config["num_hidden_layers"] == family.largest
        scalar = config["hidden_size"] // config["num_attention_heads"] if is_largest else config["head_dim"]
        if config["query_pre_attn_scalar"] != scalar:
            raise _cannot_say(
                checkpoint, f"query_pre_attn_scalar={config['query_pre_attn_scalar']}, not {scalar},"
            )
    if family.cycle is not None:
        key, cycle = family.cycle
        stored = config.get(key) or []
        if stored != [cycle[index % len(cycle)] for index in range(len(stored))]:
            raise _cannot_say(checkpoint, f"{key} other than {', '.join(map(str, cycle))}, ... by turns")
    heads, width = (config.get(key) for key in ("num_attention_heads", "hidden_size"))
    heads, width = heads or config.get("n_heads"), width or config.get("dim")
    own = config.get("head_dim") if family.architecture == "bert" else None
    if own and own * heads != width:
        raise UnsupportedError(
            f"{checkpoint.path} has {heads} heads of {own}, which are not {width} together: GGUF has no key"
            " for that in a BERT",
            hint="convert the model that heads were pruned from",
        )


def _rope_metadata(checkpoint: Checkpoint, family: GgufFamily, config: JsonObject) -> dict[str, Any]:
    if family.rope == "none":
        return {}
    rope = _rope(family, config)
    kind = rope["rope_type"]
    if kind not in family.scalings:
        raise _cannot_say(checkpoint, f"rope scaling {kind!r}")
    said = _SAID_OF_ROPE | (_SAID_OF_LLAMA3 if kind == "llama3" else set())
    if kind == "yarn":
        said |= {key for key, usual in _USUAL_YARN.items() if rope.get(key) == usual}
    if unsaid := sorted(key for key, value in rope.items() if key not in said and value is not None):
        raise _cannot_say(checkpoint, f"rope scaling with {', '.join(unsaid)}")
    has_own = family.keys.get("attention.key_length") == "head_dim"
    head_dim = config["head_dim"] if has_own else config["hidden_size"] // config["num_attention_heads"]
    part = rope.get("partial_rotary_factor")
    if family.rope != "partial" and part not in (None, 1.0):
        raise _cannot_say(checkpoint, f"partial_rotary_factor={part}")
    found: dict[str, Any] = {
        "rope.dimension_count": int(head_dim * (1.0 if part is None else part)),
        "rope.freq_base": rope["rope_theta"],
    }
    if family.rope == "by kind of layer":
        sliding = _rope_of(family, config, "sliding_attention")
        if sliding["rope_type"] != "default":
            raise _cannot_say(checkpoint, f"rope scaling {sliding['rope_type']!r} in layers with windows")
        found["rope.freq_base_swa"] = sliding["rope_theta"]
    if kind == "linear":
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": rope["factor"]}
    if kind in ("yarn", "longrope"):
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        stretch = rope.get("factor") or config["max_position_embeddings"] / original
        found["rope.scaling.original_context_length"] = original
    if kind == "yarn":
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": stretch}
    if kind == "longrope":
        usual = np.sqrt(1 + np.log(stretch) / np.log(original)) if stretch > 1 else 1.0
        found["rope.scaling.attn_factor"] = rope.get("attention_factor") or float(usual)
    elif rope.get("attention_factor") is not None:
        raise _cannot_say(checkpoint, "rope scaling with an attention_factor of its own")
    return found


def _rope(family: GgufFamily, config: JsonObject) -> JsonObject:
    """`rope_parameters` of transformers 5, or what earlier versions had in its place; of layers that see all
    where there are several kinds."""
    if family.rope == "by kind of layer":
        return _rope_of(family, config, "full_attention")
    rope = _with_kind(
        {**_old_rope(family, config), **(config.get("rope_parameters") or config.get("rope_scaling") or {})}
    )
    if config["model_type"] == "phi3" and rope["rope_type"] in ("su", "yarn", "longrope"):
        rope["rope_type"] = "longrope"
        rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return rope


def _rope_of(family: GgufFamily, config: JsonObject, kind: str) -> JsonObject:
    """Of one kind of layer: a mapping for each (transformers 5), or its theta and `rope_scaling` (before)."""
    is_sliding = kind == "sliding_attention"
    if is_sliding and family.sliding_theta is not None:
        outer = {"rope_theta": config[family.sliding_theta]}
    else:
        outer = _old_rope(family, config)
    if (parameters := config.get("rope_parameters")) is not None:
        return _with_kind({**outer, **(parameters.get(kind) or {})})
    scaling = {} if is_sliding else config.get("rope_scaling") or {}
    return _with_kind({**outer, **scaling})


def _old_rope(family: GgufFamily, config: JsonObject) -> dict[str, Any]:
    found = {key: _first(config, names) for key, names in family.old_rope.items()}
    return {"rope_theta": 10000.0, **{key: value for key, value in found.items() if value is not None}}


def _with_kind(rope: JsonObject) -> dict[str, Any]:
    return {**rope, "rope_type": rope.get("rope_type") or rope.get("type") or "default"}


def _scaled_head(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """Of a T5 that multiplies its logits with d_model ** -0.5, which llama.cpp does not: the head, scaled."""
    config, tensors = checkpoint.config, checkpoint.tensors
    is_tied = config.get("tie_word_embeddings") is not False
    if config["model_type"] != "t5" or not config.get("scale_decoder_outputs", is_tied):
        return {}
    head = tensors.get("lm_head.weight", tensors.get("shared.weight"))
    if head is None:
        return {}
    scale = np.float32(config["d_model"] ** -0.5)
    scaled = ComputedTensor(
        "lm_head.weight",
        TensorFormat.F32,
        head.shape,
        lambda begin, end: (to_f32(head.rows(begin, end)) * scale).view(np.uint8),
    )
    return {"output.weight": scaled}


def _vector(name: str, values: Any) -> StoredTensor:
    numbers = np.asarray(values, np.float32)
    return StoredTensor(name, TensorFormat.F32, numbers.shape, numbers.view(np.uint8))


def _first(config: JsonObject, names: str | tuple[str, ...]) -> Any:
    """The value of the first key that has one."""
    keys = (names,) if isinstance(names, str) else names
    return next((config[key] for key in keys if config.get(key) is not None), None)


def _number(key: str, value: Any) -> WrittenValue:
    """llama.cpp refuses a whole number, or a float64, where it expects float32."""
    if not _FLOAT_KEY.search(key):
        return value  # type: ignore[no-any-return]
    number = float(value)
    return number if float(str(np.float32(number))) == number else float(np.float32(number))


def _pooling_type(checkpoint: Checkpoint) -> int | None:
    sentence = checkpoint.sentence
    if sentence is None:
        return None
    kinds = [str(module["type"]).rpartition(".")[2] for module in sentence.modules]
    if "Normalize" not in kinds:
        raise _cannot_say(checkpoint, "embeddings of any length")
    if others := set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        raise _cannot_say(checkpoint, f"embeddings that go through {', '.join(sorted(others))}")
    modes = {kind: code for code, kind in GGUF_POOLING.items()}
    set_ = [kind for kind, flag in POOLING_FLAGS.items() if sentence.pooling.get(flag)]
    mode = sentence.pooling.get("pooling_mode", set_[0] if len(set_) == 1 else None)
    if mode not in modes:
        raise _cannot_say(checkpoint, f"a way of pooling, {sentence.pooling!s:.120},")
    return modes[mode]


def _cannot_say(checkpoint: Checkpoint, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{checkpoint.path} has {what}, which cannot be said in GGUF",
        hint="use --to safetensors or --to compressed-tensors",
    )
