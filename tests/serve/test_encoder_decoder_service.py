"""An encoder-decoder behind the server and the command: what comes is what `LLM` gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from encoder_decoder_configs import T5
from fastserve.cli.main import main
from fastserve.config import EngineOptions
from fastserve.engine.llm import LLM
from fastserve.evaluate.random_model import make_byte_tokenizer
from fastserve.serve.options import ServeOptions
from fastserve.types import SamplingParams
from serve.conftest import Server
from tiny_models import random_encoder_decoder

PROMPT = "translate English to German: The dog"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_encoder_decoder({**T5, "vocab_size": 300}).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(make_byte_tokenizer(300)))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    server = Server(folder, ServeOptions(), EngineOptions(context_length=128, threads=1), None)
    yield server
    server.close()


def texts(folder: Path, params: SamplingParams) -> list[str]:
    with LLM(folder, context_length=128, threads=1) as llm:
        return [completion.text for completion in llm.generate(PROMPT, params)]


def test_completions_are_those_of_llm(server: Server, folder: Path) -> None:
    body = {"model": "stories", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    document = server.post("/v1/completions", body).json()
    assert [choice["text"] for choice in document["choices"]] == texts(folder, SamplingParams(max_tokens=12))
    assert document["usage"]["prompt_tokens"] == len(PROMPT)


@pytest.mark.parametrize("stream", [False, True])
def test_beams_are_those_of_llm_whole_and_streamed(stream: bool, server: Server, folder: Path) -> None:
    search: dict[str, Any] = {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never", "n": 2}
    body = {"model": "stories", "prompt": PROMPT, "max_tokens": 12, "stream": stream, **search}
    response = server.post("/v1/completions", body)
    found = ["", ""]
    if stream:
        for line in response.text.splitlines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    found[choice["index"]] += choice["text"]
    else:
        found = [choice["text"] for choice in response.json()["choices"]]
    assert found == texts(folder, SamplingParams(max_tokens=12, **search))


def test_a_chat_is_refused_by_name(server: Server) -> None:
    chat = {"model": "stories", "messages": [{"role": "user", "content": "Hello"}]}
    response = server.post("/v1/chat/completions", chat)
    assert response.status_code == 400
    assert "chat template" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"num_beams": 2, "temperature": 1}, "temperature"),
        ({"num_beams": 99}, "num_beams"),
        ({"length_penalty": 2}, "length_penalty"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    options: dict[str, Any], name: str, server: Server
) -> None:
    response = server.post("/v1/completions", {"model": "stories", "prompt": PROMPT, **options})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(name)


def test_the_command_writes_what_llm_gives(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folder), PROMPT, "--max-tokens", "12", "--context-length", "128", "--json"]
    assert main(["generate", *arguments]) == 0
    greedy = json.loads(capsys.readouterr().out)
    assert greedy["text"] == texts(folder, SamplingParams(max_tokens=12))[0]
    assert greedy["prompt_tokens"] == len(PROMPT)
    assert main(["generate", *arguments, "--num-beams", "4", "--early-stopping", "true"]) == 0
    params = SamplingParams(max_tokens=12, num_beams=4, early_stopping=True)
    assert json.loads(capsys.readouterr().out)["text"] == texts(folder, params)[0]


def test_the_command_refuses_what_does_not_go_together(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(folder), PROMPT, "--length-penalty", "2"]) != 0
    assert "length_penalty=2.0 is for beam search" in capsys.readouterr().err
    assert main(["generate", str(folder), PROMPT, "--chat"]) != 0
    assert "chat template" in capsys.readouterr().err
