"""Processes that share a model's matrices compute what one does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from decoder_configs import DECODERS
from fastserve.errors import OptionError, UnsupportedError
from fastserve.tune import TuneOptions, tune
from tiny_encoders import ENCODERS
from tune.conftest import film_rows

torch = pytest.importorskip("torch")

DECODER_NAMES = (
    "llama, dynamic rope",
    "mistral, window",
    "qwen2, tied, windows",
    "qwen3, biases, windows by layer",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "smollm3",
    "gpt_neox",
)
ENCODER_NAMES = ("bert", "roberta", "xlm-roberta", "distilbert")


LLAMA = DECODERS["llama, dynamic rope"]


def plan_of(model: Any, size: int) -> Mapping[str, str]:
    from fastserve.tune.tensor_parallel import tensor_plan

    return tensor_plan(model, size)


def random_model(config: dict[str, Any], kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    found = transformers.AutoConfig.for_model(**deepcopy(config))
    return getattr(transformers, kind).from_config(found).train(False)


def compare(rank: int, rendezvous: str, models: dict[str, tuple[str, dict[str, Any]]]) -> None:
    """In each of two processes: losses and gradients of cut models are those of whole ones."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    from fastserve.tune.part import whole
    from fastserve.tune.tensor_parallel import cut_tensors

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    tokens = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    for name, (kind, config) in models.items():
        judge = random_model(config, kind)
        model = deepcopy(judge)
        summed = cut_tensors(model, mesh)
        losses = []
        for one in (judge, model):
            outputs = one(input_ids=tokens)
            loss = outputs[0].float().square().mean()
            loss.backward()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-5), name
        for module in summed:
            for parameter in module.parameters():
                distributed.all_reduce(parameter.grad)
        expected = dict(judge.named_parameters())
        num_cut = 0
        for path, parameter in model.named_parameters():
            assert torch.equal(whole(parameter), expected[path]), f"{name}: {path}"
            if expected[path].grad is None:
                assert parameter.grad is None
                continue
            num_cut += whole(parameter).shape != parameter_part(parameter)
            scale = expected[path].grad.abs().max().item()
            difference = (whole(parameter.grad) - expected[path].grad).abs().max().item()
            assert difference <= 1e-5 * scale + 1e-9, f"{name}: {path}: {difference} of {scale}"
        assert num_cut >= 4, name
    distributed.destroy_process_group()


def parameter_part(parameter: Any) -> Any:
    return getattr(parameter, "_local_tensor", parameter).shape


def test_gradients_of_every_family_that_can_be_cut_are_those_of_whole_models(tmp_path: Path) -> None:
    from torch.multiprocessing import spawn

    # A vocabulary that can be shared: heads that are not tied are cut too.
    models = {name: ("AutoModelForCausalLM", {**DECODERS[name], "vocab_size": 96}) for name in DECODER_NAMES}
    models |= {name: ("AutoModelForTokenClassification", ENCODERS[name]) for name in ENCODER_NAMES}
    spawn(compare, (str(tmp_path / "rendezvous"), models), nprocs=2)


def compare_dropout(rank: int, rendezvous: str) -> None:
    """In each of two processes, of a model whose two heads are alike: what is dropped of them is not, all
    else is."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    from fastserve.tune.tensor_parallel import cut_tensors

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)

    def is_same_in_both(values: Any) -> bool:
        found = [torch.empty_like(values) for _ in range(2)]
        distributed.all_gather(found, values.contiguous())
        return bool(torch.equal(*found))

    changes = {"num_attention_heads": 2, "hidden_dropout_prob": 0.2, "num_hidden_layers": 1}
    for rate in (0.0, 0.5):
        config = {**ENCODERS["bert"], **changes, "attention_probs_dropout_prob": rate}
        model = random_model(config, "AutoModel").train()
        attention = model.encoder.layer[0].attention.self
        with torch.no_grad():
            for linear in (attention.query, attention.key, attention.value):
                linear.weight[12:] = linear.weight[:12]
        cut_tensors(model, init_device_mesh("cpu", (2,)))
        heads: list[Any] = []
        attention.register_forward_hook(lambda module, given, made, to=heads: to.append(made[0].detach()))
        tokens = torch.arange(3, 40).reshape(1, -1)
        torch.manual_seed(3)
        for _ in range(2):
            assert is_same_in_both(model(input_ids=tokens)[0].detach())
        assert [is_same_in_both(values) for values in heads] == [rate == 0.0] * 2
        assert not torch.equal(*heads)  # of dropped states of tokens, or, with a rate, of heads
        assert is_same_in_both(torch.get_rng_state())
    distributed.destroy_process_group()


def test_dropout_is_drawn_for_each_head_and_alike_for_all_that_is_whole(tmp_path: Path) -> None:
    from torch.multiprocessing import spawn

    spawn(compare_dropout, (str(tmp_path / "rendezvous"),), nprocs=2)


def test_a_head_is_cut_where_it_is_a_matrix_of_its_own() -> None:
    def head_style(**changes: Any) -> str | None:
        model = random_model({**LLAMA, **changes}, "AutoModelForCausalLM")
        return plan_of(model, 2).get("lm_head")

    assert head_style(vocab_size=96) == "colwise_gather_output"
    assert head_style(vocab_size=97) is None
    assert head_style(vocab_size=96, tie_word_embeddings=True) is None


@pytest.mark.parametrize("name", ["gpt2", "opt", "mixtral", "qwen3_moe"])
def test_families_without_a_plan_that_can_be_followed_are_refused_by_name(name: str) -> None:
    model = random_model(DECODERS[name], "AutoModelForCausalLM")
    with pytest.raises(UnsupportedError, match=f"tensor_parallel=2: .*architecture '{name}'"):
        plan_of(model, 2)


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (4, {}, "num_key_value_heads=2 cannot be shared evenly"),
        (3, {}, "num_attention_heads=4 cannot be shared evenly"),
        (2, {"intermediate_size": 41}, "the 41 rows of model.layers.0.mlp.gate_proj cannot be shared"),
    ],
)
def test_heads_and_widths_that_cannot_be_shared_are_refused(
    size: int, changes: dict[str, Any], message: str
) -> None:
    model = random_model({**LLAMA, **changes}, "AutoModelForCausalLM")
    with pytest.raises(OptionError, match=message):
        plan_of(model, size)


def test_a_model_that_cannot_be_cut_is_refused_before_a_run_is_begun(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in film_rows(8)), "utf-8")
    with pytest.raises(OptionError, match="tensor_parallel=4: the model's num_attention_heads=2"):
        tune(
            "text-classification",
            model=str(tiny_encoder),
            train=rows,
            output=tmp_path / "out",
            options=TuneOptions(processes=4, tensor_parallel=4, device="cpu"),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "processes=1 is not a multiple of tensor_parallel=2"),
        ({"processes": 3}, "processes=3 is not a multiple of tensor_parallel=2"),
        ({"processes": 2, "method": "lora"}, "tensor_parallel cannot be had with method='lora'"),
        ({"processes": 2, "optimizer": "adafactor"}, "tensor_parallel cannot be had with optimizer="),
        ({"processes": 2, "keep_zeros": True}, "tensor_parallel cannot be had with keep_zeros=True"),
        ({"processes": 2, "teacher": "a"}, "tensor_parallel is not for learning from a teacher"),
        ({"processes": 2, "shard": True}, "there is one for each part of the matrices"),
        (
            {"processes": 4, "batch_size": 9},
            "multiple of processes / tensor_parallel x accumulation, 2",
        ),
    ],
)
def test_what_cannot_be_had_with_shared_matrices_is_refused_by_name(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        TuneOptions(tensor_parallel=2, **options)


def test_processes_with_the_same_rows_do_not_divide_a_batch() -> None:
    TuneOptions(batch_size=9, processes=4, tensor_parallel=4)
