"""Metrics of tasks against scikit-learn's and seqeval's definitions, worked out by hand, and against each
other."""

from __future__ import annotations

import numpy as np
import pytest

from fastserve.evaluate.answer_match import answer_f1, answer_tokens, exact_match
from fastserve.evaluate.bootstrap import bootstrap
from fastserve.evaluate.calibration import calibration_error, reliability
from fastserve.evaluate.classification import averages, confusion_matrix, figures_of_confusion
from fastserve.evaluate.correlation import pearson, spearman
from fastserve.evaluate.text_overlap import overlap_metrics, rouge


def test_figures_of_classes_are_those_of_scikit_learn() -> None:
    gold = ["a", "a", "a", "b", "b", "c"]
    said = ["a", "a", "b", "b", "c", "b"]
    labels = ["a", "b", "c", "never"]
    figures = figures_of_confusion(confusion_matrix(gold, said, labels), labels)
    assert figures["a"].precision == 1.0
    assert figures["a"].recall == pytest.approx(2 / 3)
    assert figures["b"].f1 == pytest.approx(2 * 1 / (3 + 2))
    assert figures["c"].f1 == 0.0
    # sklearn.metrics.f1_score(gold, said, average="macro") and "weighted"
    assert averages(figures)["f1_macro"] == pytest.approx((0.8 + 0.4 + 0.0) / 3)
    assert averages(figures)["f1_weighted"] == pytest.approx((3 * 0.8 + 2 * 0.4) / 6)


def test_a_classifier_that_is_as_sure_as_it_is_right_has_no_calibration_error() -> None:
    rng = np.random.default_rng(0)
    confidences = rng.uniform(0.5, 1.0, 20_000)
    is_right = rng.uniform(size=20_000) < confidences
    assert calibration_error(reliability(confidences.tolist(), is_right.tolist())) < 0.015
    assert calibration_error(reliability([1.0] * 10, [False] * 10)) == 1.0


def test_correlations_agree_with_numpy_and_ranks_share_ties() -> None:
    x, y = [1.0, 2.0, 2.0, 4.0, 5.0], [2.0, 1.0, 3.0, 9.0, 5.0]
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert spearman(x, y) == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4, 5], [2, 1, 3, 5, 4])[0, 1])
    assert pearson([1.0, 1.0], [1.0, 2.0]) == 0.0


def test_answers_are_compared_by_words_and_chinese_ones_by_characters() -> None:
    assert answer_tokens("The Great Wall, 长城") == ["great", "wall", "长", "城"]
    assert exact_match("the Wall!", ["Wall"]) == 1.0
    assert answer_f1("北京市", ["北京"]) == pytest.approx(0.8)
    assert answer_f1("", []) == exact_match("", []) == 1.0
    assert answer_f1("Wall", []) == 0.0


def test_equal_texts_have_the_highest_overlap_and_others_what_they_share() -> None:
    texts = ["the cat sat on the mat today", "a dog ran far away from here"]
    metrics = overlap_metrics(texts, texts)
    assert metrics["bleu"] == pytest.approx(100.0)
    assert metrics["rouge2"] == metrics["exact_match"] == 1.0
    shared = rouge("cat dog bird", "cat bird fish dog")
    assert shared["rouge1"] == pytest.approx(6 / 7)
    assert shared["rougeL"] == pytest.approx(4 / 7)
    chinese = overlap_metrics(["今天天气很好我们去公园"], ["今天天气很好我们去学校"])
    assert 0 < chinese["bleu"] < 100


def test_the_interval_of_a_mean_is_that_of_the_central_limit() -> None:
    values = np.random.default_rng(1).normal(0.3, 1.0, 400)
    found = bootstrap(lambda rows: {"mean": float(values[rows].mean())}, 400, resamples=2000, seed=0)["mean"]
    width = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - width, abs=0.01)
    assert found.high == pytest.approx(values.mean() + width, abs=0.01)
    assert found.share_above > 0.99
