"""Every head of an encoder family against the class of transformers that has it, on tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decoder_configs import DECODERS, LLAMA
from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.graph.node import Graph
from fastserve.models.family import arrange_tensors, build_graph, read_config
from fastserve.models.head import Head
from fastserve.models.parameters import check_parameters
from fastserve.models.task import TaskSettings, read_task
from parity import BACKENDS, RANGE_BOUND, Run, compile_graph, make_batch, range_error
from tiny_encoders import ENCODERS
from tiny_heads import randomize
from tiny_models import BERT_CONFIG, hf_parameters, random_language_model

TEXTS = [list(range(3, 43)), [7, 8, 9], [5], list(range(90, 20, -1))]
NUM_LABELS = 5

# One of each family; another where a head has features of its own.
FAMILIES: dict[str, dict[str, Any]] = {
    **{name: config for name, config in ENCODERS.items() if "," not in name},
    "modernbert, with biases, mean": {
        **ENCODERS["modernbert"],
        "norm_bias": True,
        "classifier_bias": True,
        "classifier_pooling": "mean",
        "classifier_activation": "relu",
    },
}
_DECODERS = {
    "llama": LLAMA,
    **{
        name: DECODERS[name]
        for name in ("mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox", "opt")
    },
}
CLASSES = ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice"]


def hf_head(name: str, ending: str, *, seed: int = 0) -> Any:
    """A random model of a class of transformers; all parameters are random, biases and norms too."""
    import transformers

    options = {key: value for key, value in FAMILIES[name].items() if key != "model_type"}
    options["num_labels"] = 2 if ending == "ForQuestionAnswering" else NUM_LABELS
    config = transformers.AutoConfig.for_model(FAMILIES[name]["model_type"], **options)
    model = getattr(transformers, f"AutoModel{ending}").from_config(config)
    model.config.architectures = [type(model).__name__]
    return randomize(model, seed=seed)


def hf_logits(model: Any, token_ids: list[int], types: list[int] | None = None) -> np.ndarray:
    """[labels] of one text, or [tokens, labels]."""
    import torch

    ids = torch.tensor([token_ids])
    fields = {"attention_mask": torch.ones_like(ids)}
    if types is not None:
        fields["token_type_ids"] = torch.tensor([types])
    with torch.no_grad():
        if type(model).__name__.endswith("ForMultipleChoice"):
            fields = {key: value[None] for key, value in fields.items()}
            return model(ids[None], **fields).logits[0].numpy()
        output = model(ids, **fields)
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits[0], output.end_logits[0]], dim=1).numpy()
    return output.logits[0].numpy()


def settings_of(model: Any) -> TaskSettings:
    return read_task(model.config.to_dict(), {}, is_decoder=False)


def graph_of(model: Any) -> Graph:
    parameters = hf_parameters(model)
    graph = build_graph(read_config(model.config.to_dict()), parameters, ending=settings_of(model).head)
    unused = check_parameters(graph, parameters)
    assert [name for name in unused if "position_ids" not in name and "pooler" not in name] == []
    return graph


@pytest.mark.parametrize("ending", CLASSES)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_class_of_transformers(name: str, ending: str) -> None:
    model = hf_head(name, ending)
    expected = [hf_logits(model, ids) for ids in TEXTS]
    stacked = np.concatenate(expected) if expected[0].ndim == 2 else np.stack(expected)
    for backend in BACKENDS:
        try:
            executable = compile_graph(backend, graph_of(model), hf_parameters(model), max_context=128)
        except UnsupportedError as error:
            pytest.skip(error.message)
        runs = [(Run(executable, place), ids) for place, ids in enumerate(TEXTS)]
        actual = executable.run(make_batch(runs)).outputs["logits"]
        assert range_error(actual, stacked) < RANGE_BOUND, backend


@pytest.mark.parametrize("name", _DECODERS)
def test_decoders_classify_texts_as_the_class_of_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(**{**_DECODERS[name], "num_labels": NUM_LABELS})
    model = random_language_model(config, AutoModelForSequenceClassification.from_config)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    own = read_config(checkpoint.config)
    tensors = arrange_tensors(own, checkpoint.tensors)
    settings = read_task(checkpoint.config, {}, is_decoder=True)
    assert settings.task == "text-classification"
    graph = build_graph(own, tensors, ending=settings.head)
    assert check_parameters(graph, tensors) == ()
    parameters = {name: to_f32(tensor) for name, tensor in tensors.items()}
    expected = np.stack([hf_logits(model, ids) for ids in TEXTS])
    for backend in BACKENDS:
        try:
            executable = compile_graph(backend, graph, parameters, max_context=128)
        except UnsupportedError as error:
            pytest.skip(error.message)
        runs = [(Run(executable, place), ids) for place, ids in enumerate(TEXTS)]
        actual = executable.run(make_batch(runs)).outputs["logits"]
        assert range_error(actual, expected) < RANGE_BOUND, backend


@pytest.mark.parametrize("ending", CLASSES)
def test_a_head_that_is_left_out_or_of_another_kind_gives_other_numbers(ending: str) -> None:
    model = hf_head("bert", ending)
    parameters = hf_parameters(model)
    name = next(name for name in parameters if name.endswith(("classifier.bias", "outputs.bias")))
    parameters[name] = parameters[name] + np.float32(1e-3)
    executable = compile_graph("torch", graph_of(model), parameters, max_context=128)
    actual = executable.run(make_batch([(Run(executable), TEXTS[0])])).outputs["logits"]
    expected = hf_logits(model, TEXTS[0]).reshape(actual.shape)
    assert np.abs(actual - expected).max() > RANGE_BOUND * max(np.ptp(expected), 1)


def test_a_family_without_a_head_refuses_it_by_name() -> None:
    head = Head("multiple-choice", 1)
    config = read_config({**BERT_CONFIG})
    assert build_graph(config, ending=head).outputs["logits"].width == 1
    with pytest.raises(UnsupportedError, match="a bert model for summarization is not supported"):
        build_graph(config, ending=Head("summarization", 1))  # type: ignore[arg-type]


BERT_FOR = {"architectures": ["BertForSequenceClassification"]}


@pytest.mark.parametrize(
    ("config", "card", "expected"),
    [
        ({}, {}, TaskSettings(task="embed")),
        ({"architectures": ["BertForMaskedLM"]}, {}, TaskSettings(task="embed")),
        ({}, {"task": "embedding"}, TaskSettings(task="embed", is_declared=True)),
        ({}, {"task": "summarization"}, TaskSettings(task="generate", is_declared=True)),
        (
            {**BERT_FOR, "id2label": {"1": "spam", "0": "ham"}},
            {"task": "text-classification", "max_length": 64},
            TaskSettings(
                task="text-classification",
                head=Head("sequence-classification", 2),
                is_declared=True,
                labels=("ham", "spam"),
                max_length=64,
            ),
        ),
        (
            {**BERT_FOR, "problem_type": "regression", "id2label": {"0": "x"}},
            {},
            TaskSettings(
                task="text-classification",
                head=Head("sequence-classification", 1),
                labels=("x",),
                problem_type="regression",
            ),
        ),
    ],
)
def test_the_task_follows_from_the_architecture_or_from_fastserve_json(config, card, expected) -> None:
    assert read_task(config, card, is_decoder=False) == expected


def test_a_model_with_one_logit_or_without_labels_is_read_as_transformers_reads_it() -> None:
    assert read_task(BERT_FOR, {}, is_decoder=False).labels == ("LABEL_0", "LABEL_1")
    one = read_task({**BERT_FOR, "id2label": {"0": "x"}}, {}, is_decoder=False)
    assert one.problem_type == "multi_label_classification"


@pytest.mark.parametrize(
    ("config", "card", "message"),
    [
        (BERT_FOR, {"task": "question-answering"}, "is for text-classification or pair-classification"),
        ({}, {"task": "question-answering"}, "has no head for it"),
        ({**BERT_FOR, "id2label": {"0": "a", "2": "b"}}, {}, "not numbered from 0"),
        (BERT_FOR, {"max_length": 0}, "max_length=0"),
    ],
)
def test_what_contradicts_itself_is_refused(config, card, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_task(config, card, is_decoder=False)


def test_an_unknown_task_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="task='poetry'"):
        read_task({}, {"task": "poetry"}, is_decoder=False)
