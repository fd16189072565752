"""Prefix tuning: what it is for, and from what has learned to the tensors of a model directory."""

from __future__ import annotations

import warnings
from typing import Any

from fastserve.errors import UnsupportedError
from fastserve.evaluate.task.task import Task
from fastserve.models.config import DecoderConfig
from fastserve.models.family import read_config
from fastserve.models.prefix import PREFIX_KEY, prefix_tensor
from fastserve.tune.options import TuneOptions
from fastserve.types import JsonObject

_TASK_TYPES = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}


def check_prefix(model: str, config: JsonObject, task: Task, options: TuneOptions) -> None:
    """Check, before anything is trained, that a model can have a prefix for a task; other methods pass.

    Args:
        model: its name, for messages.
        config: its config.json.

    Raises:
        UnsupportedError: it is no decoder, or the task has another head than those for texts.
    """
    if options.method != "prefix":
        return
    read = read_config(config)
    if not isinstance(read, DecoderConfig):
        kind = "an encoder-decoder" if config.get("is_encoder_decoder") else "an encoder"
        raise UnsupportedError(
            f"method='prefix' is for decoders, and {model} ({config.get('model_type')}) is {kind}: texts have"
            " no earlier keys and values there that they could come after",
            hint="choose lora, dora or ia3, or a decoder",
        )
    if task.model_class not in _TASK_TYPES or config.get("model_type") == "gemma3":
        what = task.name if task.model_class not in _TASK_TYPES else "models of images and texts (gemma3)"
        raise UnsupportedError(f"method='prefix' is not for {what}", hint="choose lora, dora or ia3")


def add_prefix(model: Any, task: Task, options: TuneOptions) -> Any:
    """A model of `transformers` behind a prefix that learns, and with it the task's head, which is new."""
    import peft

    settings = peft.PrefixTuningConfig(
        task_type=_TASK_TYPES[task.model_class],
        num_virtual_tokens=options.prefix_tokens,
        prefix_projection=options.prefix_projection,
    )
    with warnings.catch_warnings():
        # peft 0.21 asks for an attribute by the name it had before transformers 5.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return peft.get_peft_model(model, settings)


def take_off_prefix(model: Any) -> tuple[Any, dict[str, Any]]:
    """What `add_prefix` made, taken apart: the model with its head, and the prefix as tensors of a checkpoint
    (see `fastserve.models.prefix`). Its config says from here on that it has one."""
    from peft.utils.other import ModulesToSaveWrapper

    # [tokens, 2 * layers * width]
    embeddings = model.get_prompt_embedding_to_save(model.active_adapter).float()
    settings = model.active_peft_config
    plain = model.get_base_model()
    for name, module in list(plain.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, attribute = name.rpartition(".")
            setattr(plain.get_submodule(parent), attribute, module.modules_to_save[model.active_adapter])
    plain.requires_grad_(True)
    # peft's past_key_values: of each layer its keys, then its values.
    parts = embeddings.view(settings.num_virtual_tokens, 2 * settings.num_layers, -1).unbind(1)
    tensors = {
        prefix_tensor(index // 2, "values" if index % 2 else "keys"): part.contiguous()
        for index, part in enumerate(parts)
    }
    setattr(plain.config, PREFIX_KEY, {"num_virtual_tokens": settings.num_virtual_tokens})
    return plain, tensors
