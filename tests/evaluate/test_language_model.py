"""Perplexity, KL and agreement on the native runtime, against `transformers` and closed forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastserve._native")

from fastserve.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.errors import DataError, UnsupportedError
from fastserve.evaluate.language_model import (
    Difference,
    LanguageModel,
    compare_models,
    log_softmax,
    perplexity,
    read_windows,
)

STORY = "Once upon a time, there was a little girl named Lily. She liked to play in the park. "


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Checkpoint:
    return open_checkpoint(shared_data / "model_stories260K")


def with_noise(checkpoint: Checkpoint, scale: float) -> Checkpoint:
    rng = np.random.default_rng(0)
    tensors = dict(checkpoint.tensors)
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            values = to_f32(tensor) * (1 + scale * rng.standard_normal(tensor.shape)).astype(np.float32)
            tensors[name] = StoredTensor(
                name, TensorFormat.F32, tensor.shape, values.view(np.uint8).reshape(-1)
            )
    return replace(checkpoint, tensors=tensors)


def logits_of_transformers(checkpoint: Checkpoint, window: list[int]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    state = {name: torch.from_numpy(to_f32(tensor).copy()) for name, tensor in checkpoint.tensors.items()}
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        return model(torch.tensor([window])).logits[0].numpy()


def test_losses_are_those_of_transformers_in_steps_of_any_size(
    stories: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = read_windows(stories, [STORY * 3])[0]
    expected = -log_softmax(logits_of_transformers(stories, window)[:-1])
    expected = expected[np.arange(len(window) - 1), window[1:]]
    for step_bytes in (2**25, 7 * 4 * 512):
        monkeypatch.setattr("fastserve.evaluate.language_model._STEP_BYTES", step_bytes)
        losses = LanguageModel(stories, weights="f32", kv_dtype="f32").losses(window)
        np.testing.assert_allclose(losses, expected, atol=1e-4)


def test_differences_are_those_of_the_logits_of_transformers(stories: Checkpoint) -> None:
    windows = read_windows(stories, [STORY * 3], length=32)
    noisy = with_noise(stories, 0.2)
    one, other = (LanguageModel(model, weights="f32", kv_dtype="f32") for model in (stories, noisy))
    found = compare_models(one, other, windows)
    assert found.starts.tolist() == np.cumsum([0, *(len(window) - 1 for window in windows)]).tolist()
    kl, same = [], []
    for window in windows:
        p, q = (log_softmax(logits_of_transformers(model, window)[:-1]) for model in (stories, noisy))
        kl.append((np.exp(p) * (p - q)).sum(axis=1))
        same.append(p.argmax(axis=1) == q.argmax(axis=1))
    np.testing.assert_allclose(found.kl, np.concatenate(kl), atol=1e-4)
    assert (found.is_same == np.concatenate(same)).mean() > 0.9
    figures = found.figures(resamples=200)
    assert figures["mean_kl"].value == pytest.approx(np.concatenate(kl).mean(), rel=1e-3)
    assert figures["mean_kl"].low < figures["mean_kl"].value < figures["mean_kl"].high
    ratio = figures["other_perplexity"].value / figures["perplexity"].value
    assert figures["perplexity_increase"].value == pytest.approx(ratio - 1)
    assert perplexity(one, windows).value == pytest.approx(figures["perplexity"].value)


def test_a_model_does_not_differ_from_itself(stories: Checkpoint) -> None:
    model = LanguageModel(stories)
    figures = compare_models(model, model, read_windows(stories, [STORY], length=16)).figures(resamples=10)
    assert figures["mean_kl"].value == 0.0
    assert figures["top1_agreement"].value == figures["top1_agreement_outside_ties"].value == 1.0
    assert figures["perplexity_increase"].high == 0.0


def test_greedy_tokens_are_those_of_the_engine(stories: Checkpoint) -> None:
    from fastserve import LLM, SamplingParams

    (prompt,) = read_windows(stories, [STORY])
    with LLM(stories.path) as llm:
        (completion,) = llm.generate([prompt], SamplingParams(max_tokens=40, ignore_eos=True))
    assert LanguageModel(stories).greedy(prompt, 40) == list(completion.token_ids)


def test_agreement_outside_ties_leaves_out_what_was_almost_tied() -> None:
    found = Difference(
        starts=np.array([0, 2, 4]),
        token_ids=np.array([1, 1, 1, 1]),
        losses=np.ones(4),
        other_losses=np.full(4, 1.5),
        kl=np.array([0.0, 0.2, 0.0, 0.2]),
        is_clear=np.array([True, False, True, True]),
        predicted=np.array([1, 2, 3, 4]),
        other_predicted=np.array([1, 5, 3, 5]),
    )
    figures = found.figures(resamples=10)
    assert figures["top1_agreement"].value == 0.5
    assert figures["top1_agreement_outside_ties"].value == pytest.approx(2 / 3)
    assert figures["perplexity_increase"].value == pytest.approx(np.exp(0.5) - 1)
    assert figures["mean_kl"].value == pytest.approx(0.1)


def test_windows_hold_the_text_but_for_a_short_end(stories: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_text(STORY * 4, encoding="utf-8")
    (whole,) = read_windows(stories, path, length=512)
    windows = read_windows(stories, path, length=64)
    joined = [token for window in windows for token in window]
    assert joined == whole[: len(joined)]
    assert len(whole) - len(joined) < 32
    assert read_windows(stories, path, length=64, most=2) == windows[:2]


def test_what_has_no_perplexity_is_refused(
    stories: Checkpoint, tmp_path: Path, model_dir: Callable[[str], Path]
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="has 0 tokens"):
        read_windows(stories, empty)
    with pytest.raises(DataError, match="cannot be read"):
        read_windows(stories, tmp_path / "none.txt")
    with pytest.raises(UnsupportedError, match="no perplexity"):
        LanguageModel(model_dir("all-minilm-l6-v2"))
