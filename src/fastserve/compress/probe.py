"""Probes: what an artifact answers to a few inputs, kept in it, so that anybody can see that it still does.

They are made twice: of the model in memory, and of the folder that was written; both must be the same.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np

from fastserve.backends.native.executable import compile_native
from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.compress.model_kind import writes_text
from fastserve.compress.step import WorkingModel
from fastserve.engine.encoder import Encoder, EncoderInput
from fastserve.engine.llm import LLM
from fastserve.engine.load import model_context, read_ending
from fastserve.errors import CheckpointError
from fastserve.evaluate.language_model import LanguageModel
from fastserve.graph.passes import optimize
from fastserve.models.config import DecoderConfig
from fastserve.models.family import arrange_tensors, build_graph, read_config
from fastserve.models.head import Head
from fastserve.types import Float32Array, JsonObject, Limits, SamplingParams

TEXTS = ("Once upon a time", "The capital of France is", "She said: 1, 2, 3,")
_MOST_PROMPT_TOKENS = 64
_COMPLETION_TOKENS = 16
_SHOWN_VALUES = 8
_TOLERANCE = 0.01  # of values of another machine, whose kernels add in another order


def make_probes(model: WorkingModel, folder: Path, *, threads: int | None = None) -> Seq[JsonObject]:
    """Probes of a settled model, held to what its folder answers when it is opened as it is served.

    Raises:
        CheckpointError: they differ.
    """
    checkpoint = model.checkpoint
    config = read_config(checkpoint.config)
    room = min(model_context(checkpoint, config), _MOST_PROMPT_TOKENS + _COMPLETION_TOKENS)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    prompts = [tokenizer.encode(text)[: max(room - _COMPLETION_TOKENS, 1)] for text in TEXTS]
    if writes_text(checkpoint):
        count = min(_COMPLETION_TOKENS, room - max(map(len, prompts)))
        own = LanguageModel(checkpoint, threads=threads, window=room)
        expected: list[Any] = [own.greedy(prompt, count) for prompt in prompts]
        found: list[Any] = _complete(folder, prompts, count, threads)
        probes = [
            {"prompt": text, "max_tokens": count, "temperature": 0.0, "token_ids": tokens}
            for text, tokens in zip(TEXTS, expected, strict=True)
        ]
    else:
        expected = _outputs(checkpoint, prompts, threads)
        found = _outputs_of_folder(folder, prompts, threads)
        probes = [
            {
                "text": text,
                "values": [float(value) for value in values.reshape(-1)[:_SHOWN_VALUES]],
                "tolerance": _TOLERANCE,
            }
            for text, values in zip(TEXTS, expected, strict=True)
        ]
    for text, ours, theirs in zip(TEXTS, expected, found, strict=True):
        if not np.array_equal(ours, theirs):
            raise CheckpointError(
                f"{folder} does not answer as the model that was written: to {text!r} {_short(theirs)}, "
                f"{_short(ours)} was expected",
                hint="report it as a defect of fastserve, with the recipe",
            )
    return probes


def _complete(folder: Path, prompts: Seq[Seq[int]], count: int, threads: int | None) -> list[list[int]]:
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    with LLM(
        folder, threads=threads, max_sequences=4, context_length=len(max(prompts, key=len)) + count
    ) as llm:
        return [list(one.checked().token_ids) for one in llm.generate(prompts, params)]


def _outputs_of_folder(folder: Path, prompts: Seq[Seq[int]], threads: int | None) -> list[Float32Array]:
    with LLM(folder, threads=threads) as llm:
        encoder = Encoder(llm.model.executable, llm.model.settings.head)
        return encoder.run_all([EncoderInput(prompt) for prompt in prompts])


def _outputs(checkpoint: Checkpoint, prompts: Seq[Seq[int]], threads: int | None) -> list[Float32Array]:
    """Of an encoder whose tensors may be in memory."""
    config = read_config(checkpoint.config)
    ending = read_ending(checkpoint, config)
    tensors = arrange_tensors(config, checkpoint.tensors)
    has_whole_numbers = any(isinstance(tensor, GroupedTensor) for tensor in tensors.values())
    longest = max(map(len, prompts))
    computed = config.for_context(longest) if isinstance(config, DecoderConfig) else config
    executable = compile_native(
        optimize(build_graph(computed, tensors.keys(), ending=ending)),
        tensors,
        weights="stored" if has_whole_numbers else "f32",
        threads=threads,
        limits=Limits(
            max_tokens=longest * len(prompts),
            max_outputs=1,
            max_sequences=len(prompts),
            num_blocks=len(prompts) * -(-longest // 32),
            max_context=longest,
        ),
    )
    encoder = Encoder(executable, ending if isinstance(ending, Head) else None)
    return encoder.run_all([EncoderInput(prompt) for prompt in prompts])


def _short(values: Any) -> str:
    return str(np.asarray(values).reshape(-1)[:6].tolist())
