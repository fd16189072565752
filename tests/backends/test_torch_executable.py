from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fastserve.backends.torch.executable import TorchExecutable, compile_torch
from fastserve.backends.torch.sample import sample
from fastserve.backends.torch.step import Step
from fastserve.errors import OptionError
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import RopeTable
from fastserve.types import Executable, Limits, SamplingBatch
from parity import Run, make_batch
from tiny_models import LLAMA_CONFIG, random_parameters, tiny_graph

LIMITS = Limits(max_outputs=128, num_blocks=64, max_context=64)


def compile_tiny(**options: object) -> TorchExecutable:
    graph = tiny_graph(LLAMA_CONFIG)
    return compile_torch(graph, random_parameters(graph), limits=LIMITS, **options)  # type: ignore[arg-type]


def sampling_of(num_rows: int) -> SamplingBatch:
    """Seeded sampling of rows that all differ in their seeds."""
    zeros = np.zeros(num_rows, np.float32)
    return SamplingBatch(
        temperature=zeros + 1,
        top_k=np.zeros(num_rows, np.int32),
        top_p=zeros + 1,
        min_p=zeros,
        presence_penalty=zeros,
        frequency_penalty=zeros,
        repetition_penalty=zeros + 1,
        seeds=np.arange(num_rows, dtype=np.uint64),
        draws=np.zeros(num_rows, np.uint64),
        num_logprobs=np.full(num_rows, 2, np.int32),
        history_starts=np.zeros(num_rows + 1, np.int32),
        history_prompt_lengths=np.zeros(num_rows, np.int32),
        history_ids=np.zeros(0, np.int32),
        bias_starts=np.zeros(num_rows + 1, np.int32),
        bias_ids=np.zeros(0, np.int32),
        bias_values=np.zeros(0, np.float32),
        mask_starts=np.zeros(num_rows + 1, np.int32),
        mask_words=np.zeros(0, np.uint32),
    )


def test_it_is_an_executable_with_the_options_it_was_compiled_with() -> None:
    executable: Executable = compile_tiny(block_size=8)
    assert (executable.limits, executable.block_size, executable.vocab_size) == (LIMITS, 8, 97)


def test_a_batch_that_asks_for_sampling_is_sampled_from_its_logits() -> None:
    executable = compile_tiny()
    batch = replace(make_batch([(Run(executable), [3, 1, 4, 1, 5])]), sampling=sampling_of(5))
    result = executable.run(batch)
    assert batch.sampling is not None
    expected = sample(result.outputs["logits"], batch.sampling)
    for name in ("token_ids", "logprobs", "top_token_ids", "top_logprobs"):
        np.testing.assert_array_equal(getattr(result, name), getattr(expected, name))


def test_a_batch_that_asks_for_none_gets_logits_only() -> None:
    executable = compile_tiny()
    result = executable.run(make_batch([(Run(executable), [3, 1, 4])]))
    assert result.token_ids is None
    assert result.outputs["logits"].shape == (3, 97)


def test_the_block_size_does_not_change_logits() -> None:
    prompt = list(range(40))
    logits = [Run(compile_tiny(block_size=size)).step(prompt) for size in (3, 8, 64)]
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[0], logits[2])


@pytest.mark.parametrize("kv_dtype", ["f16", "bf16", "int8"])
def test_keys_and_values_are_read_back_as_they_are_stored_within_the_same_step_too(kv_dtype: str) -> None:
    prompt = list(range(20))
    run = Run(compile_tiny(kv_dtype=kv_dtype))
    at_once = Run(compile_tiny(kv_dtype=kv_dtype)).step(prompt)
    one_by_one = np.concatenate([run.step([token]) for token in prompt])
    np.testing.assert_allclose(one_by_one, at_once, rtol=0, atol=1e-6)
    exact = Run(compile_tiny(kv_dtype="f32")).step(prompt)
    assert np.abs(at_once - exact).max() > 1e-5  # so that reading unstored values would have shown above


def test_rope_turns_only_the_first_dimensions_of_a_partial_table() -> None:
    b = GraphBuilder()
    x = b.embedding("token_ids", "embed", size=3, width=6)
    table = RopeTable(dim=2, inverse_frequencies=(0.5,), scale=2.0)
    graph = b.finish(logits=b.rope(x, table, head_dim=3))
    weights = np.arange(1, 19, dtype=np.float32).reshape(3, 6)
    executable = compile_torch(graph, {"embed": weights}, limits=LIMITS)
    turned = executable.run(make_batch([(Run(executable), [0, 1, 2])])).outputs["logits"]
    for position in range(3):
        cos, sin = 2 * np.cos(0.5 * position), 2 * np.sin(0.5 * position)
        for head in (0, 3):
            x0, x1, x2 = weights[position, head : head + 3]
            expected = [x0 * cos - x1 * sin, x1 * cos + x0 * sin, x2]
            np.testing.assert_allclose(turned[position, head : head + 3], expected, rtol=1e-6, atol=1e-6)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(OptionError, match="kv_dtype='f8'"):
        compile_tiny(kv_dtype="f8")
    with pytest.raises(OptionError, match="block_size=0"):
        compile_tiny(block_size=0)
    with pytest.raises(OptionError, match="device='abacus' does not work"):
        compile_tiny(device="abacus")


def test_weights_keys_and_values_are_on_the_device_that_was_named() -> None:
    executable = compile_tiny(device="meta")  # the one device beside the CPU that every torch has
    tensors = [
        *executable._weights.values(),
        *(t for layer in executable._kv.values() for t in (layer.keys, layer.values)),
    ]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_a_device_with_too_little_memory_is_a_memory_error(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")

    def run_out(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "zeros", run_out)
    with pytest.raises(MemoryError, match="out of memory"):
        compile_tiny()


def test_a_step_for_which_the_device_has_too_little_memory_is_a_memory_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch = pytest.importorskip("torch")
    executable = compile_tiny()
    batch = make_batch([(Run(executable), [3, 1, 4])])

    def run_out(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Step, "from_batch", run_out)
    with pytest.raises(MemoryError, match="out of memory"):
        executable.run(batch)


def test_a_batch_beyond_the_limits_is_refused() -> None:
    executable = compile_tiny()
    with pytest.raises(OptionError, match="positions holds 64"):
        executable.run(make_batch([(Run(executable), [0] * 65)]))
