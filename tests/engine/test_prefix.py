"""Models behind a tuned prefix, held to peft on `transformers`: positions, memory, and what an engine does
with sequences."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eviction import evict_again_and_again
from safetensors.numpy import load_file, save_file

import fastserve.engine.prefix as prefix_module
from decoder_configs import (
    GEMMA,
    GEMMA2,
    GEMMA3,
    GPT2,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    NEOX,
    OPT,
    PHI3,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    SMOLLM3,
)
from fastserve.engine.llm import LLM
from fastserve.errors import CheckpointError, ContextLengthError, MemoryLimitError, UnsupportedError
from fastserve.graph.node import Embedding, Graph, Rope
from fastserve.graph.passes import leave_slots_empty
from fastserve.models.prefix import prefix_tensor
from fastserve.types import Batch, Float32Array, SamplingParams
from parity import RANGE_BOUND
from tiny_models import BERT_CONFIG, hf_model
from tiny_prefixes import greedy, make_prefixed

EXACT: dict[str, Any] = {"weights": "f32", "kv_dtype": "f32"}
CONFIGS = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "phi3": PHI3,
    "smollm3": SMOLLM3,
    "gemma": GEMMA,
    "gemma2": {**GEMMA2, "sliding_window": 40},
    "gemma3": {**GEMMA3, "sliding_window": 40},
    "gpt2": GPT2,
    "gpt_neox": NEOX,
    "opt": OPT,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
}
LENGTHS = (1, 33, 70)  # of texts in one batch
PROMPTS = [[(7 * i + 3 * j) % 90 + 4 for j in range(length)] for i, length in enumerate((1, 5, 31, 32, 40))]

MakeFolder = Callable[[str, int], tuple[Path, Any]]


@pytest.fixture(scope="module")
def prefixed(tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    """The directory of a family's tiny model with a prefix of so many tokens, and peft's model."""

    @cache
    def make(name: str, num_tokens: int) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp("prefixed")
        model = make_prefixed(folder, CONFIGS[name], num_tokens)
        save_tokenizer(folder)
        return folder, model

    return make


@pytest.fixture(scope="module")
def expected(prefixed: MakeFolder) -> Callable[[str], list[list[int]]]:
    """The 64 likeliest tokens after each prompt, by peft, behind a prefix of 20 tokens."""
    return cache(lambda name: [greedy(prefixed(name, 20)[1], prompt, 64) for prompt in PROMPTS])


def save_tokenizer(folder: Path) -> None:
    """One in which token i is the word wi."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)


def ragged_batch(lengths: tuple[int, ...]) -> tuple[list[list[int]], Batch]:
    """Texts of these lengths, whole, in blocks that are in no order; all rows have outputs."""
    texts = [[(11 * i + 5 * j + j * j) % 97 for j in range(length)] for i, length in enumerate(lengths)]
    width = -(-max(lengths) // 32)
    tables = np.arange(len(lengths) * width, dtype=np.int32)[::-1].reshape(len(lengths), width)
    num_tokens = sum(lengths)
    return texts, Batch(
        token_ids=np.concatenate(texts).astype(np.int32),
        positions=np.concatenate([np.arange(length) for length in lengths]).astype(np.int32),
        sequence_starts=np.cumsum([0, *lengths]).astype(np.int32),
        context_lengths=np.array(lengths, np.int32),
        block_tables=np.ascontiguousarray(tables),
        output_rows=np.arange(num_tokens, dtype=np.int32),
    )


def both_logits(folder: Path, model: Any, **options: Any) -> tuple[Float32Array, Float32Array]:
    """Ours and peft's of the same texts [tokens, vocab]."""
    texts, batch = ragged_batch(LENGTHS)
    options = {**EXACT, "context_length": 96, "max_sequences": sum(LENGTHS), **options}
    with LLM(folder, **options) as llm:
        ours = llm.model.executable.run(batch).outputs["logits"].copy()
    with torch.inference_mode():
        theirs = [model(input_ids=torch.tensor([text])).logits[0].numpy() for text in texts]
    return ours, np.concatenate(theirs)


def error_of(found: Float32Array, expected: Float32Array) -> float:
    """The largest, by the range of what is expected."""
    return float(np.abs(found - expected).max() / np.ptp(expected))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_behind_a_prefix_are_those_of_peft(prefixed: MakeFolder, name: str, backend: str) -> None:
    assert error_of(*both_logits(*prefixed(name, 20), backend=backend)) < RANGE_BOUND


@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 64, 300])
def test_a_prefix_may_be_of_any_length(prefixed: MakeFolder, num_tokens: int, backend: str) -> None:
    """Of no whole block, of one, and of more than attention takes at once."""
    for name in ("llama", "gpt2"):
        assert error_of(*both_logits(*prefixed(name, num_tokens), backend=backend)) < RANGE_BOUND


@pytest.mark.parametrize(("kv_dtype", "bound"), [("f16", 2e-3), ("bf16", 2e-2), ("int8", 3e-2)])
def test_a_prefix_is_stored_as_all_keys_and_values_are(
    prefixed: MakeFolder, kv_dtype: str, bound: float, backend: str
) -> None:
    error = error_of(*both_logits(*prefixed("llama", 20), backend=backend, kv_dtype=kv_dtype))
    assert RANGE_BOUND < error < bound


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_positions_that_are_off_by_one_would_be_seen(
    prefixed: MakeFolder, name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off_by_one(graph: Graph, count: int) -> Graph:
        def moved(node: Any) -> Any:
            if isinstance(node, Rope):
                return replace(node, table=replace(node.table, offset=node.table.offset + 1))
            if isinstance(node, Embedding) and node.ids == "positions":
                return replace(node, offset=node.offset + 1)
            return node

        made = leave_slots_empty(graph, count)
        return Graph(tuple(map(moved, made.nodes)), made.outputs)

    monkeypatch.setattr(prefix_module, "leave_slots_empty", off_by_one)
    error = error_of(*both_logits(*prefixed(name, 20), backend=backend))
    # Of rotary models only distances to the prefix's unturned keys change.
    assert error > 20 * RANGE_BOUND


def complete(llm: LLM, count: int = 64) -> list[list[int]]:
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    return [list(one.checked().token_ids) for one in llm.generate(PROMPTS, params)]


@pytest.mark.parametrize(
    ("backend", "name", "kv_spill"),
    [
        pytest.param("native", "llama", None, marks=pytest.mark.slow),
        ("native", "gpt2", "1MiB"),
        ("torch", "llama", "1MiB"),
        pytest.param("torch", "gpt2", None, marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_peft_together_preempted_and_moved(
    prefixed: MakeFolder,
    expected: Callable[[str], list[list[int]]],
    name: str,
    kv_spill: str | None,
    backend: str,
) -> None:
    folder, _ = prefixed(name, 20)
    options = {**EXACT, "backend": backend, "context_length": 128, "kv_spill": kv_spill}
    with LLM(folder, **options, max_sequences=5) as llm:
        block_bytes = llm.model.executable.block_bytes
        whole = complete(llm)
        assert whole == complete(llm)  # the first blocks of prompts are known by now
    assert whole == expected(name)
    # One block is the prefix's; the rest holds two of the five texts.
    with LLM(folder, **options, max_sequences=5, kv_memory=8 * block_bytes) as llm:
        assert llm.model.executable.limits.num_blocks == 7
        evict_again_and_again(llm)
        assert complete(llm) == whole
        assert llm._engine is not None
        counters = llm._engine.scheduler.residency.counters
    assert counters.evictions > 10
    assert (counters.blocks_in > 0) == (kv_spill is not None)


@pytest.mark.parametrize("prefill_chunk_tokens", [1, 7, 33])
def test_tokens_do_not_depend_on_how_a_prompt_is_cut(prefixed: MakeFolder, prefill_chunk_tokens: int) -> None:
    folder, _ = prefixed("llama", 45)
    with LLM(folder, **EXACT) as llm:
        whole = complete(llm, 8)
    with LLM(folder, **EXACT, prefill_chunk_tokens=prefill_chunk_tokens, max_sequences=2) as llm:
        assert complete(llm, 8) == whole


def test_logprobs_of_a_prompt_are_those_of_peft(prefixed: MakeFolder, backend: str) -> None:
    folder, model = prefixed("gpt2", 20)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([PROMPTS[-1]])).logits[0]
    chosen = torch.tensor(PROMPTS[-1][1:])
    expected = logits[:-1].log_softmax(-1)[torch.arange(len(chosen)), chosen]
    with LLM(folder, **EXACT, backend=backend) as llm:
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        (completion,) = llm.generate([PROMPTS[-1]], params)
    found = [token.logprob for token in completion.checked().prompt_logprobs or ()]
    assert completion.prompt_tokens == len(PROMPTS[-1])
    assert found == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_prefix_takes_positions_from_the_context(prefixed: MakeFolder, name: str, backend: str) -> None:
    """Of the models' 512."""
    folder, model = prefixed(name, 20)
    prompt = [(5 * j + j * j) % 97 for j in range(488)]
    with LLM(folder, **EXACT, backend=backend) as llm:
        assert llm.model.context_length == 492
        (completion,) = llm.generate([prompt], SamplingParams(max_tokens=4, ignore_eos=True))
        with pytest.raises(ContextLengthError):
            llm.generate([prompt], SamplingParams(max_tokens=5))
    assert list(completion.token_ids) == greedy(model, prompt, 4)
    with pytest.raises(ContextLengthError, match="the model was made for 492 tokens"):
        LLM(folder, context_length=493)


def test_memory_must_hold_a_block_beside_the_prefix(prefixed: MakeFolder) -> None:
    folder, _ = prefixed("llama", 33)
    with LLM(folder, **EXACT) as llm:
        block_bytes = llm.model.executable.block_bytes
    with pytest.raises(MemoryLimitError, match="holds 2 blocks of 32 tokens; the least is 3"):
        LLM(folder, **EXACT, kv_memory=2 * block_bytes)
    with LLM(folder, **EXACT, kv_memory=3 * block_bytes) as llm:
        assert llm.generate([[5, 6]], SamplingParams(max_tokens=8, ignore_eos=True))[0].checked().token_ids


@pytest.mark.parametrize(
    "options",
    [
        {"speculation": "prompt-lookup"},
        {"speculation": "draft", "draft_layers": 2},
        {"speculation": "draft", "draft_model": "plain"},
    ],
    ids=str,
)
def test_guesses_change_no_token(
    prefixed: MakeFolder,
    expected: Callable[[str], list[list[int]]],
    options: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Be they of its own first layers, which have the prefix, or of a model without one."""
    folder, model = prefixed("llama", 20)
    if "draft_model" in options:
        model.get_base_model().save_pretrained(tmp_path / "plain")
        save_tokenizer(tmp_path / "plain")
        options = {**options, "draft_model": tmp_path / "plain"}
    with LLM(folder, **EXACT, **options) as llm:
        assert complete(llm, 24) == [tokens[:24] for tokens in expected("llama")]


def test_several_completions_of_a_prompt_share_its_blocks_behind_the_prefix(prefixed: MakeFolder) -> None:
    folder, _ = prefixed("llama", 20)
    params = SamplingParams(max_tokens=16, temperature=1.0, seed=5, ignore_eos=True)
    with LLM(folder, **EXACT) as llm:
        alone = [
            llm.generate([PROMPTS[2]], replace(params, seed=seed))[0].checked().token_ids
            for seed in (5, 6, 7)
        ]
        together = [one.checked().token_ids for one in llm.generate([PROMPTS[2]], replace(params, n=3))]
    assert together == alone


def test_blocks_of_the_prefix_are_nobodys(prefixed: MakeFolder, backend: str) -> None:
    folder, _ = prefixed("llama", 33)
    with LLM(folder, **EXACT, backend=backend) as llm:
        executable = llm.model.executable
        first = executable.limits.num_blocks
        data = np.zeros(executable.block_bytes, np.uint8)
        for call in (
            lambda: executable.write_block(first, data),
            lambda: executable.read_block(first + 1, data),
            lambda: executable.copy_block(0, first),
        ):
            with pytest.raises(ValueError, match=r"the limits are 0 and"):
                call()


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"num_virtual_tokens": 0}, "it must give num_virtual_tokens, from 1"),
        ([20], "it must give num_virtual_tokens, from 1"),
        ({"num_virtual_tokens": 21}, "of the wrong shape"),
        ({"num_virtual_tokens": 512}, "512 positions, which its prefix leaves none of"),
    ],
    ids=str,
)
def test_a_prefix_that_does_not_fit_is_refused(
    prefixed: MakeFolder, tmp_path: Path, described: Any, message: str
) -> None:
    folder = copy_of(prefixed("llama", 20)[0], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "prefix_tuning": described}), "utf-8")
    with pytest.raises(CheckpointError, match=message):
        LLM(folder)


def test_a_prefix_that_lacks_a_layer_is_refused(prefixed: MakeFolder, tmp_path: Path) -> None:
    folder = copy_of(prefixed("llama", 20)[0], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors[prefix_tensor(1, "values")]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensor is missing: prefix\.layers\.1\.values"):
        LLM(folder)


def test_an_encoder_has_no_prefix(tmp_path: Path) -> None:
    hf_model(BERT_CONFIG).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    changed = {**config, "prefix_tuning": {"num_virtual_tokens": 4}}
    (tmp_path / "config.json").write_text(json.dumps(changed), "utf-8")
    with pytest.raises(UnsupportedError, match="has a tuned prefix, and 'bert' is no decoder"):
        LLM(tmp_path)


def copy_of(folder: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(folder, target)
    return target
