"""Tiny random models behind random prefixes, by peft, and the model directories that tuning would make of
them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoConfig

from fastserve.tune.prefix import take_off_prefix
from tiny_models import random_language_model


def make_prefixed(
    folder: Path, config: dict[str, Any], num_tokens: int, *, kind: Any = None, task_type: str = "CAUSAL_LM"
) -> Any:
    """A model of a config, or of a class `kind`, behind a prefix; its directory is written. Returns peft's
    model."""
    model = random_language_model(AutoConfig.for_model(**copy.deepcopy(config)), kind, seed=1)
    torch.manual_seed(num_tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = peft.PrefixTuningConfig(task_type=task_type, num_virtual_tokens=num_tokens)
        prefixed = peft.get_peft_model(model, settings).eval()
    for parameter in prefixed.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter, std=1.5)  # so that it decides what is written
    plain, tensors = take_off_prefix(copy.deepcopy(prefixed))
    plain.save_pretrained(folder, state_dict={**plain.state_dict(), **tensors})
    return prefixed


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens after a prompt, the whole text read anew for each."""
    ids = list(prompt)
    for _ in range(count):
        with torch.inference_mode():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]
