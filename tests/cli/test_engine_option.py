from __future__ import annotations

from typing import Any

import click
import pytest

from fastserve.cli.chat import chat
from fastserve.cli.embed import embed
from fastserve.cli.engine_option import engine_options, sampling_options
from fastserve.cli.generate import generate
from fastserve.config import EngineOptions
from fastserve.types import SamplingParams

SAMPLING = SamplingParams(
    max_tokens=9, temperature=0.5, top_k=3, top_p=0.8, min_p=0.1, seed=4, stop=("a", "b")
)
ENGINE = EngineOptions(
    weights="f32",
    kv_dtype="f32",
    threads=2,
    context_length=64,
    kv_memory="1MiB",
    kv_spill="2MiB",
    spill_dir="spilled",
    policy="mlfq",
    speculation="prompt-lookup",
    max_draft_tokens=5,
    prompt_lookup_min=1,
    prompt_lookup_max=3,
    backend="native",
)
ENGINE_NAMES = (
    "weights",
    "kv_dtype",
    "threads",
    "context_length",
    "kv_memory",
    "kv_spill",
    "spill_dir",
    "policy",
    "speculation",
    "max_draft_tokens",
    "prompt_lookup_min",
    "prompt_lookup_max",
    "draft_model",
    "draft_weights",
    "draft_layers",
    "draft_kv_memory",
    "backend",
    "device",
)


def run(arguments: list[str], *, defaults: SamplingParams | None = None) -> dict[str, Any]:
    """What a command with every option gets for these arguments."""
    got: dict[str, Any] = {}

    @click.command()
    @sampling_options(defaults or SamplingParams())
    @engine_options(*ENGINE_NAMES)
    @click.option("--other", is_flag=True)
    def command(**values: Any) -> None:
        got.update(values)

    command.main(arguments, standalone_mode=False)
    return got


def test_without_arguments_the_defaults_are_those_of_the_options() -> None:
    assert run([]) == {"params": SamplingParams(), "options": EngineOptions(), "other": False}


def test_a_command_may_have_defaults_of_its_own() -> None:
    assert run([], defaults=SAMPLING)["params"] == SAMPLING


def test_every_argument_reaches_the_field_of_its_name() -> None:
    sampling = "--max-tokens 9 --temperature 0.5 --top-k 3 --top-p 0.8 --min-p 0.1 --seed 4 --stop a --stop b"
    engine = "--weights f32 --kv-dtype f32 --threads 2 --context-length 64 --backend native"
    memory = "--kv-memory 1MiB --kv-spill 2MiB --spill-dir spilled --policy mlfq"
    lookup = "--max-draft-tokens 5 --prompt-lookup-min 1 --prompt-lookup-max 3"
    speculation = f"--speculation prompt-lookup {lookup}"
    got = run([*sampling.split(), *engine.split(), *memory.split(), *speculation.split(), "--other"])
    assert got == {"params": SAMPLING, "options": ENGINE, "other": True}


def test_the_device_reaches_its_field_with_the_backend_that_has_one() -> None:
    got = run(["--backend", "torch", "--device", "cuda:1"])
    assert got["options"] == EngineOptions(backend="torch", device="cuda:1")


def test_the_draft_model_reaches_its_fields() -> None:
    draft = "--draft-model tiny --draft-weights int4 --draft-layers 3 --draft-kv-memory 1MiB"
    got = run(["--speculation", "draft", *draft.split()])
    assert got["options"] == EngineOptions(
        speculation="draft",
        draft_model="tiny",
        draft_weights="int4",
        draft_layers=3,
        draft_kv_memory="1MiB",
    )


def test_a_number_that_is_none_is_refused_by_the_flag() -> None:
    for arguments in (["--threads", "two"], ["--temperature", "warm"], ["--weights", "int3"]):
        with pytest.raises(click.BadParameter):
            run(arguments)


@pytest.mark.parametrize("command", [chat, generate, embed], ids=["chat", "generate", "embed"])
def test_a_flag_is_spelled_as_the_field_and_explained(command: click.Command) -> None:
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert [option.opts for option in options] == [
        [f"--{option.name.replace('_', '-')}"] for option in options
    ]
    assert all(option.help for option in options)
