"""Which weights learn: all, the head, the last layers, an adapter (peft) that is merged in at the end, or a
prefix."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from fastserve.errors import OptionError, UnsupportedError
from fastserve.evaluate.task.embedding import Embedding
from fastserve.evaluate.task.task import Task
from fastserve.tune.options import TuneOptions
from fastserve.tune.prefix import add_prefix

# T5's layers are `block`s, each of some that are called `layer`.
_LAYER = re.compile(r"\.(?:block|layer|layers|h|blocks)\.(\d+)\.")
_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "ForSeq2SeqLM": "SEQ_2_SEQ_LM",
}


def prepare_weights(model: Any, task: Task, options: TuneOptions) -> Any:
    """Freeze what does not learn, or put an adapter around a model. Returns the model to train.

    Raises:
        OptionError: the model has fewer layers than are to learn.
        UnsupportedError: the model has no linear layers that an adapter knows.
    """
    from fastserve.evaluate.embedding_model import EmbeddingModel

    if isinstance(model, EmbeddingModel):
        model.encoder = prepare_weights(model.encoder, task, options)
        return model
    if options.method == "prefix":
        return add_prefix(model, task, options)
    if options.is_adapter:
        return _with_adapter(model, task, options)
    if options.method == "full":
        return model
    head = _head_parameters(model, task)
    layers = _layer_numbers(model)
    num_layers = max(layers.values(), default=-1) + 1
    first = num_layers
    if options.method == "last-layers":
        if options.last_layers > num_layers:
            raise OptionError(
                f"last_layers={options.last_layers} is more than the {num_layers} that the model has",
                hint=f"choose at most {num_layers}",
                option="last_layers",
            )
        first = num_layers - options.last_layers
    if not head and options.method == "head":
        raise OptionError(
            f"method={options.method!r}: the model has no head of its own for {task.name}",
            hint="choose full, last-layers or an adapter",
            option="method",
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in head or layers.get(name, -1) >= first
    return model


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter alone, as peft opens it on the model that it was put around."""
    from fastserve.evaluate.embedding_model import EmbeddingModel

    around = model.encoder if isinstance(model, EmbeddingModel) else model
    around.save_pretrained(folder)


def merge_adapter(model: Any) -> Any:
    """The model with its adapter's weights added to its own: what `transformers` and the native runtime
    open."""
    from fastserve.evaluate.embedding_model import EmbeddingModel

    if isinstance(model, EmbeddingModel):
        model.encoder = model.encoder.merge_and_unload()
        return model
    return model.merge_and_unload()


def _with_adapter(model: Any, task: Task, options: TuneOptions) -> Any:
    import peft

    kind = _TASK_TYPES.get(task.model_class, "FEATURE_EXTRACTION")
    # Every linear layer but the head's (QLoRA, arXiv 2305.14314, section 4: all layers are needed to match
    # full tuning); the head, which is new, learns in full.
    head = sorted({name.rpartition(".")[0] for name in _head_parameters(model, task)})
    shared: dict[str, Any] = {"task_type": kind, "target_modules": _linear_layers(model)}
    if task.model_class != "ForCausalLM" and head:
        shared["modules_to_save"] = head
    if not shared["target_modules"]:
        raise UnsupportedError(f"method={options.method!r}: the model has no linear layers in its encoder")
    if options.method == "ia3":
        feedforward = [name for name in shared["target_modules"] if _is_feedforward(name)]
        config: Any = peft.IA3Config(**shared, feedforward_modules=feedforward)
    else:
        config = peft.LoraConfig(
            **shared,
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.adapter_dropout,
            use_dora=options.method == "dora",
        )
    with warnings.catch_warnings():
        # peft 0.21 asks for an attribute by the name it had before transformers 5.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return peft.get_peft_model(model, config)


def _linear_layers(model: Any) -> list[str]:
    from torch import nn

    return sorted(
        {
            _LAYER.split(f".{name}")[-1]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and _LAYER.search(f".{name}")
        }
    )


def _is_feedforward(name: str) -> bool:
    """The layer that leads back from the wide middle of a feed-forward part, by the names of our families."""
    names = ("mlp.down_proj", "output.dense", "ffn.lin2", "mlp.c_proj", "mlp.Wo", "mlp.fc2")
    return name in names or name.endswith("DenseReluDense.wo")


def _head_parameters(model: Any, task: Task) -> set[str]:
    """What is not of the pretrained body; of a language model, whose head is tied, the body is all there is,
    and embeddings are the body's own."""
    if isinstance(task, Embedding):
        return set()
    prefix = f"{model.base_model_prefix}."
    names = {name for name, _ in model.named_parameters()}
    body = {name for name in names if name.startswith(prefix)}
    pooler = {name for name in names if ".pooler." in name}
    return (names - body) | pooler if body else pooler


def _layer_numbers(model: Any) -> dict[str, int]:
    """Of each parameter that is in a layer, which; of an encoder-decoder those of the decoder, which is
    last."""
    names = [name for name, _ in model.named_parameters()]
    if model.config.is_encoder_decoder:
        names = [name for name in names if "decoder." in name]
    return {name: int(found[1]) for name in names if (found := _LAYER.search(f".{name}"))}
