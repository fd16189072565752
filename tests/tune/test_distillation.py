"""Learning from a teacher: losses against closed forms, logits on disk, and a student that follows its
teacher where the labels say otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastserve.errors import FastServeError, OptionError, UnsupportedError
from fastserve.evaluate.prediction import PredictorOptions
from fastserve.evaluate.task.question_answering import QuestionAnswering
from fastserve.evaluate.task.text_classification import TextClassification
from fastserve.evaluate.task.token_classification import TokenClassification
from fastserve.evaluate.task_evaluation import evaluate_folder
from fastserve.tune import TuneOptions, tune
from fastserve.tune.distillation import layer_loss, soft_loss
from fastserve.tune.logit_cache import LogitCache, keep_logits
from fastserve.tune.source_model import open_source_model
from fastserve.tune.teacher import TeacherOutputs, open_teacher
from tune.conftest import OVERLAP_KEPT, film_rows, tune_to_films

WriteRows = Callable[[str, list[dict[str, Any]]], Path]
LEARN = TuneOptions(epochs=8, batch_size=8, learning_rate=5e-3, device="cpu", max_length=32, dropout=0.0)
CLASSES = TextClassification(labels=("a", "b", "c"), max_length=8, problem="single-label")


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def random(*shape: int, seed: int = 0, grad: bool = False) -> torch.Tensor:
    values = torch.from_numpy(np.random.default_rng(seed).normal(0, 2, shape))
    return values.requires_grad_(grad)


def test_the_soft_loss_is_the_divergence_at_a_temperature_and_its_gradient_the_difference_times_it() -> None:
    logits, taught = random(5, 3, grad=True), random(5, 3, seed=1)
    loss = soft_loss(CLASSES, {"logits": logits}, taught.float(), torch.zeros(5, dtype=torch.long), {}, 3.0)
    p, q = softmax(taught.numpy() / 3), softmax(logits.detach().numpy() / 3)
    assert loss.item() == pytest.approx(9 * (p * np.log(p / q)).sum(), rel=1e-5)
    loss.backward()
    np.testing.assert_allclose(logits.grad, 3 * (q - p), rtol=1e-4, atol=1e-6)


def test_tokens_whose_labels_are_ignored_are_not_learned_from_the_teacher() -> None:
    task = TokenClassification(labels=("O", "B-X"), max_length=8, stride=0)
    logits, taught = random(2, 4, 2, grad=True), random(2, 4, 2, seed=1)
    labels = torch.tensor([[0, 1, -100, -100], [-100, 1, 1, 0]])
    soft_loss(task, {"logits": logits}, taught.float(), labels, {}, 1.0).backward()
    assert logits.grad is not None
    assert ((logits.grad.abs().sum(dim=2) > 0) == (labels != -100)).all()


def test_several_labels_and_numbers_have_losses_of_their_own() -> None:
    logits, taught, labels = random(4, 3), random(4, 3, seed=1).float(), torch.zeros(4, 3)
    several = replace(CLASSES, problem="multi-label")
    p, q = (1 / (1 + np.exp(-x.numpy() / 2)) for x in (taught, logits))
    expected = -4 * (p * np.log(q) + (1 - p) * np.log(1 - q)).sum()
    assert soft_loss(several, {"logits": logits}, taught, labels, {}, 2.0).item() == pytest.approx(
        expected, rel=1e-5
    )
    number = replace(CLASSES, problem="regression")
    expected = ((logits[:, :1] - taught[:, :1]) ** 2).sum().item()
    found = soft_loss(number, {"logits": logits[:, :1]}, taught[:, :1], labels[:, 0], {}, 2.0).item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_answers_are_compared_among_the_tokens_that_are_no_padding() -> None:
    task = QuestionAnswering(max_length=8, stride=0)
    logits, taught = random(1, 4, 2), random(1, 4, 2, seed=1).float()
    outputs = {"start_logits": logits[..., 0], "end_logits": logits[..., 1]}
    labels, mask = torch.tensor([[1, 2]]), torch.tensor([[1, 1, 1, 0]])
    p, q = (softmax(x[0, :3].numpy().T) for x in (taught, logits))
    found = soft_loss(task, outputs, taught, labels, {"attention_mask": mask}, 1.0).item()
    assert found == pytest.approx((p * np.log(p / q)).sum(), rel=1e-4)


def test_the_loss_of_attention_maps_has_the_gradient_of_a_mean_square_over_the_tokens_of_a_row() -> None:
    maps, taught = random(2, 3, 4, 4, grad=True), random(2, 3, 4, 4, seed=1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    options = TuneOptions(teacher="t", attention_weight=0.5)
    outputs = {"attentions": (maps,)}
    layer_loss(outputs, TeacherOutputs(taught, attentions=(taught,)), mask, options).backward()
    assert maps.grad is not None
    for row, length in enumerate((3, 4)):
        expected = torch.zeros(3, 4, 4, dtype=torch.float64)
        difference = (maps - taught)[row, :, :length, :length].detach()
        expected[:, :length, :length] = 0.5 * 2 * difference / (3 * length**2)
        torch.testing.assert_close(maps.grad[row], expected)


def test_a_layer_is_held_to_the_last_of_the_teacher_s_layers_that_it_stands_for() -> None:
    states = [random(1, 2, 4, seed=seed) for seed in range(5)]
    mask = torch.ones(1, 2, dtype=torch.long)
    options = TuneOptions(teacher="t", hidden_weight=1.0)
    taught = TeacherOutputs(states[0], hidden_states=tuple(states))
    outputs = {"hidden_states": (states[0], states[2], states[4])}
    assert layer_loss(outputs, taught, mask, options).item() == 0
    mapped = replace(options, layer_map=(0, 1))
    assert layer_loss(outputs, taught, mask, mapped).item() > 0
    with pytest.raises(OptionError, match="does not fit 2 layers that learn from 4"):
        layer_loss(outputs, taught, mask, replace(options, layer_map=(0, 4)))


@pytest.fixture(scope="module")
def teacher(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has learned which films are good."""
    return tune_to_films(tiny_encoder, tmp_path_factory.mktemp("teacher"), LEARN, num_rows=64)


def test_a_student_follows_its_teacher_where_labels_say_otherwise(
    tiny_encoder: Path, teacher: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    wrong = [{**row, "label": "ny"[row["label"] == "n"]} for row in film_rows(64)]
    result = tune(
        "text-classification",
        model=str(tiny_encoder),
        train=write_rows("train", wrong),
        dev=write_rows("dev", film_rows(20)),
        output=tmp_path / "student",
        options=replace(LEARN, teacher=str(teacher), soft_weight=1.0),
        on_problem=OVERLAP_KEPT,
    )
    assert result.metrics["accuracy"] == 1.0
    served = evaluate_folder(result.path, film_rows(20), PredictorOptions(weights="f32"))  # type: ignore[arg-type]
    assert served.scores.metrics["accuracy"] == 1.0


def test_hidden_states_and_attention_maps_come_nearer_to_the_teacher_s(
    tiny_encoder: Path, teacher: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    losses: list[float] = []
    options = replace(LEARN, teacher=str(teacher), hidden_weight=1.0, attention_weight=1.0, epochs=6)
    tune(
        "text-classification",
        model=str(tiny_encoder),
        train=write_rows("train", film_rows(64)),
        output=tmp_path / "student",
        options=options,
        report=lambda progress: losses.append(progress.figures.get("loss", np.inf)),
    )
    finite = [loss for loss in losses if np.isfinite(loss)]
    assert finite[-1] < 0.5 * finite[0]


def test_logits_are_kept_on_disk_and_read_again(
    tiny_encoder: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TextClassification(labels=("n", "y"), max_length=32, problem="single-label")
    source = open_source_model(str(tiny_encoder), tiny_encoder)
    opened = open_teacher(str(teacher), task, source)
    features = task.encode(film_rows(12), source.tokenizer, with_labels=True).features
    pad = source.tokenizer.pad_token_id
    cache = keep_logits(opened.model, features, tmp_path, pad_token_id=pad)
    assert cache is not None
    ids = torch.tensor([features[7]["input_ids"]])
    online = opened.model(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"].numpy()
    np.testing.assert_allclose(cache.batch([7], num_tokens=ids.shape[1]), online, atol=1e-5)
    monkeypatch.setattr("fastserve.tune.logit_cache.write_part", lambda *_: pytest.fail("computed again"))
    assert keep_logits(opened.model, features, tmp_path, pad_token_id=pad) is not None


def test_logits_of_tokens_are_padded_to_the_batch(tmp_path: Path) -> None:
    values = np.arange(10, dtype=np.float32)
    cache = LogitCache(values, [(2, 2), (3, 2)], is_per_token=True)
    batch = cache.batch([1, 0], num_tokens=4)
    assert batch.tolist() == [[[4, 5], [6, 7], [8, 9], [0, 0]], [[0, 1], [2, 3], [0, 0], [0, 0]]]


@pytest.mark.parametrize(
    ("labels", "message"), [("nz", "have other labels: 'y' is in one of them only|'z' is"), ("ny", "")]
)
def test_a_teacher_with_other_labels_is_refused(
    tiny_encoder: Path, teacher: Path, labels: str, message: str
) -> None:
    task = TextClassification(labels=tuple(labels), max_length=32, problem="single-label")
    source = open_source_model(str(tiny_encoder), tiny_encoder)
    if not message:
        assert open_teacher(str(teacher), task, source).columns is None
        return
    with pytest.raises(OptionError, match=message):
        open_teacher(str(teacher), task, source)


def test_columns_of_a_teacher_are_put_in_the_order_of_the_rows_labels(
    tiny_encoder: Path, teacher: Path
) -> None:
    task = TextClassification(labels=("y", "n"), max_length=32, problem="single-label")
    source = open_source_model(str(tiny_encoder), tiny_encoder)
    columns = open_teacher(str(teacher), task, source).columns
    assert columns is not None
    assert columns.tolist() == [1, 0]


def test_a_teacher_of_another_task_or_other_tokens_is_refused(
    tiny_encoder: Path, tiny_decoder: Path, teacher: Path
) -> None:
    source = open_source_model(str(tiny_encoder), tiny_encoder)
    with pytest.raises(OptionError, match="has learned text-classification, not question-answering"):
        open_teacher(str(teacher), QuestionAnswering(max_length=8, stride=0), source)
    with pytest.raises(OptionError, match="has other tokens"):
        open_teacher(str(tiny_decoder), CLASSES, source)


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("embedding", {"text": "a film", "text_pair": "the film"}),
        ("multiple-choice", {"question": "where ?", "choices": ["in Rome", "good"], "label": 0}),
    ],
)
@pytest.mark.parametrize("option", ["hidden_weight", "attention_weight"])
def test_layers_of_what_reads_several_texts_of_a_row_are_not_compared(
    option: str, task: str, row: dict[str, Any], tiny_encoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    options = replace(LEARN, teacher=str(tiny_encoder), **{option: 1.0})  # type: ignore[arg-type]
    train = write_rows("train", [row, {**row, "text": "x", "question": "who ?"}])
    with pytest.raises(UnsupportedError, match=f"hidden_weight and attention_weight are not for {task}"):
        tune(task, model=str(tiny_encoder), train=train, output=tmp_path / "out", options=options)


@pytest.mark.parametrize("options", [{"soft_weight": 0.9}, {"layer_map": (1,)}, {"hidden_weight": 1.0}])
def test_what_is_for_a_teacher_is_refused_without_one(options: dict[str, Any]) -> None:
    with pytest.raises(FastServeError, match="is for learning from a teacher"):
        TuneOptions(**options)
