"""Trained models against `transformers`: a tiny one from the test data, real ones from the package index."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.types import Executable, Float32Array
from parity import (
    BACKENDS,
    RANGE_BOUND,
    compile_graph,
    load_model,
    range_error,
    run_embeddings,
    run_greedy,
    run_logits,
)

F16_KV_BOUND = 1e-3

PROMPT = (
    "<|im_start|>user\nWhat is the capital of France, and what is it known for?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
SENTENCES = [
    "That is a happy person.",
    "The Treaty of Westphalia ended the Thirty Years' War in 1648, at the cost of a great many lives.",
    "x",
]


@dataclass(frozen=True)
class Reference:
    """What `transformers` computed: the model in its hands, and the tokens that it was asked about."""

    path: Path
    token_ids: list[int]
    logits: Float32Array  # [tokens, vocab]
    greedy: list[int]  # the 64 tokens after token_ids


def make_reference(path: Path, model: Any, token_ids: list[int]) -> Reference:
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0].numpy()
        generated = model.generate(
            torch.tensor([token_ids]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return Reference(path, token_ids, logits, generated[0, len(token_ids) :].tolist())


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Reference:
    from transformers import AutoModelForCausalLM

    folder = shared_data / "model_stories260K"
    golden = json.loads((folder / "golden.json").read_text())["stories260K"]
    return make_reference(folder, AutoModelForCausalLM.from_pretrained(folder), golden["prompt_ids"])


@pytest.fixture(scope="module")
def smollm2(model_dir: Callable[[str], Path]) -> Reference:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    file = model_dir("smollm2-135m-instruct")
    # What from_pretrained(gguf_file=...) does, except for its demand for accelerate.
    config = LlamaConfig(**load_gguf_checkpoint(str(file))["config"])
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=_on_meta(config))["tensors"]
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return make_reference(file, model.eval(), tokenizer(PROMPT)["input_ids"])


def _on_meta(config: Any) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.fixture(scope="module", params=["stories", "smollm2"])
def reference(request: pytest.FixtureRequest) -> Reference:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Reference)
    return found


def compile_reference(backend: str, reference: Reference, kv_dtype: str) -> Executable:
    graph, parameters = load_model(reference.path)
    return compile_graph(backend, graph, parameters, kv_dtype=kv_dtype, max_context=256)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kv_dtype", "bound"), [("f32", RANGE_BOUND), ("f16", F16_KV_BOUND)])
def test_logits_and_greedy_tokens_equal_those_of_transformers(
    backend: str, kv_dtype: str, bound: float, reference: Reference
) -> None:
    executable = compile_reference(backend, reference, kv_dtype)
    assert range_error(run_logits(executable, reference.token_ids), reference.logits) < bound
    if kv_dtype == "f32":
        assert run_greedy(executable, reference.token_ids, 64) == reference.greedy


@pytest.mark.parametrize("backend", BACKENDS)
def test_stories_continue_as_recorded_in_the_test_data(backend: str, stories: Reference) -> None:
    golden = json.loads((stories.path / "golden.json").read_text())["stories260K"]
    executable = compile_reference(backend, stories, "f32")
    last = run_logits(executable, stories.token_ids)[-1]
    assert int(last.argmax()) == golden["argmax_last"]
    np.testing.assert_allclose(
        last[:8], golden["last_logits_first8"], rtol=0, atol=RANGE_BOUND * np.ptp(last)
    )
    assert stories.token_ids + run_greedy(executable, stories.token_ids, 64) == golden["greedy_64"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["all-minilm-l6-v2", pytest.param("all-mpnet-base-v2", marks=pytest.mark.slow)]
)
def test_sentence_embeddings_equal_the_normalized_mean_of_transformers(
    backend: str, name: str, model_dir: Callable[[str], Path]
) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = model_dir(name)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    texts = [tokenizer(sentence)["input_ids"] for sentence in SENTENCES]
    own_tokenizer = Tokenizer.from_checkpoint(open_checkpoint(folder))
    assert [own_tokenizer.encode(sentence) for sentence in SENTENCES] == texts
    with torch.no_grad():
        means = torch.cat([model(torch.tensor([ids])).last_hidden_state.mean(1) for ids in texts])
    expected = torch.nn.functional.normalize(means).numpy()

    graph, parameters = load_model(folder)
    executable = compile_graph(backend, graph, parameters, max_context=128)
    assert range_error(run_embeddings(executable, texts), expected) < RANGE_BOUND
