"""Adapters under HTTP: chosen by the model's name, listed, swapped by /admin/adapters while requests run."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from encoder_decoder_configs import T5
from fastserve.cli.main import main
from fastserve.engine.llm import LLM
from fastserve.errors import CheckpointError, OptionError
from fastserve.evaluate.random_model import make_byte_tokenizer
from fastserve.serve.api_keys import ApiKeys
from fastserve.serve.app import create_app
from fastserve.serve.key_file import digest_of
from fastserve.serve.model_loading import find_models
from fastserve.serve.options import ServeOptions
from fastserve.types import SamplingParams
from serve.conftest import ADMIN_KEY, CHAT_TEMPLATE, OPTIONS
from tiny_adapters import make_adapter, make_stories_adapter
from tiny_heads import save_bert_head
from tiny_models import random_encoder_decoder

PROMPT = "Once upon a time"
BODY = {"prompt": PROMPT, "max_tokens": 24, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def folders(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models `writer` and `vectors`, and adapters of each."""
    import transformers

    folder = tmp_path_factory.mktemp("adapters")
    shutil.copytree(stories, folder / "writer")
    (folder / "writer" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    for seed, name in enumerate("abc"):
        make_stories_adapter(folder / name, stories, seed=seed)
    make_stories_adapter(folder / "wide", stories, seed=3, rank=80)
    save_bert_head(folder / "vectors", "")
    model = transformers.AutoModel.from_pretrained(folder / "vectors")
    make_adapter(folder / "v", model, "bert", seed=0)
    return folder


class Server:
    def __init__(self, paths: list[Path], adapters: dict[str, Path]) -> None:
        engine = replace(OPTIONS, context_length=128, max_waiting=64, max_adapters=1, adapters=adapters)
        names = list(map(str, paths))
        serve_options = ServeOptions(admin_key_file="admin")
        self.models = find_models(names, serve_options, engine)
        self.models.set_up()
        self.loop = asyncio.new_event_loop()
        app = create_app(self.models, serve_options, keys=ApiKeys({}, admin_digest=digest_of(ADMIN_KEY)))
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(
            transport=transport, base_url="http://localhost", headers={"x-api-key": ADMIN_KEY}, timeout=60
        )

    def run(self, awaitable: Any) -> Any:
        async def run() -> Any:
            return await awaitable

        return self.loop.run_until_complete(asyncio.wait_for(run(), 60))

    def get(self, path: str) -> Any:
        return self.run(self.client.get(path))

    def post(self, path: str, /, **body: Any) -> Any:
        return self.run(self.client.post(path, json=body))

    def texts(self, *models: str) -> list[str]:
        """What each of these writes, all at once."""

        async def ask() -> list[httpx.Response]:
            posts = [self.client.post("/v1/completions", json={**BODY, "model": model}) for model in models]
            return await asyncio.gather(*posts)

        answers = self.run(ask())
        assert [answer.status_code for answer in answers] == [200] * len(models), answers[0].text
        assert [answer.json()["model"] for answer in answers] == list(models)
        return [answer.json()["choices"][0]["text"] for answer in answers]

    def close(self) -> None:
        self.run(self.client.aclose())
        self.run(self.models.close())
        self.loop.close()


@pytest.fixture
def server(folders: Path) -> Iterator[Server]:
    adapters = {"writer:a": folders / "a", "writer:b": folders / "b", "vectors:v": folders / "v"}
    server = Server([folders / "writer", folders / "vectors"], adapters)
    yield server
    server.close()


@pytest.fixture(scope="module")
def expected(folders: Path) -> dict[str | None, str]:
    """What each adapter writes, in process."""
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    adapters = {name: folders / name for name in "abc"}
    with LLM(folders / "writer", adapters=adapters, context_length=256) as llm:
        return {name: llm.generate(PROMPT, params, adapter=name)[0].text for name in (None, *adapters)}


def test_requests_choose_adapters_by_the_models_name(server: Server, expected: dict[str | None, str]) -> None:
    models = ["writer", "writer:a", "writer:b", "writer:a", "writer"]
    assert server.texts(*models) == [expected[name] for name in (None, "a", "b", "a", None)]
    assert len(set(expected.values())) == 4


def test_every_way_to_generate_takes_the_adapter(server: Server) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    chat = {"messages": messages, "max_tokens": 12, "temperature": 0}
    texts = []
    for model in ("writer", "writer:a"):
        answers = [
            server.post("/v1/chat/completions", model=model, **chat),
            server.post("/v1/messages", model=model, **chat),
            server.post("/v1/responses", model=model, input=messages, max_output_tokens=12, temperature=0),
        ]
        assert [answer.status_code for answer in answers] == [200] * 3
        first, second, third = (answer.json() for answer in answers)
        own = {
            first["choices"][0]["message"]["content"],
            second["content"][0]["text"],
            third["output"][0]["content"][0]["text"],
        }
        assert len(own) == 1
        texts.append(own)
    assert texts[0] != texts[1]


def test_an_encoder_embeds_with_the_adapter_that_is_asked_for(server: Server) -> None:
    vectors = [
        server.post("/v1/embeddings", model=model, input="the cat sat").json()["data"][0]["embedding"]
        for model in ("vectors", "vectors:v", "vectors")
    ]
    assert vectors[0] == vectors[2] != vectors[1]


def test_adapters_are_listed_with_the_model_that_they_are_beside(server: Server) -> None:
    documents = {document["id"]: document for document in server.get("/v1/models").json()["data"]}
    parents = {id_: document["parent"] for id_, document in documents.items()}
    assert parents == {
        "writer": None,
        "vectors": None,
        "writer:a": "writer",
        "writer:b": "writer",
        "vectors:v": "vectors",
    }
    assert documents["writer:a"]["root"] == "writer"
    assert server.get("/v1/models/writer:a").json() == documents["writer:a"]


def test_an_adapter_that_there_is_not_is_a_404_that_says_which_there_are(server: Server) -> None:
    answer = server.post("/v1/completions", model="writer:x", **BODY)
    assert answer.status_code == 404
    assert "has no adapter 'x'" in answer.text
    assert "writer:a, writer:b" in answer.text
    assert server.post("/v1/completions", model="vectors:a", **BODY).status_code == 404
    assert server.post("/v1/completions", model="nobody:a", **BODY).status_code == 404
    assert server.get("/v1/models/writer:x").status_code == 404


def test_an_adapter_is_loaded_swapped_and_unloaded_while_the_server_runs(
    server: Server, folders: Path, expected: dict[str | None, str]
) -> None:
    answer = server.post("/admin/adapters/load", model="writer", name="new", path=str(folders / "c"))
    assert answer.status_code == 200
    assert answer.json()["id"] == "writer:new"
    assert server.texts("writer:new", "writer:a") == [expected["c"], expected["a"]]
    server.post("/admin/adapters/load", model="writer", name="new", path=str(folders / "b"))
    assert server.texts("writer:new") == [expected["b"]]
    listed = server.get("/admin/adapters").json()["adapters"]
    assert {a["id"]: a["path"] for a in listed}["writer:new"] == str(folders / "b")
    assert server.post("/admin/adapters/unload", model="writer", name="new").status_code == 200
    assert server.post("/v1/completions", model="writer:new", **BODY).status_code == 404
    assert server.post("/admin/adapters/unload", model="writer", name="new").status_code == 404


def test_what_cannot_be_loaded_is_refused_and_changes_nothing(server: Server, folders: Path) -> None:
    for name, path, status, message in (
        ("x", folders / "none", 404, "is no folder"),
        ("x", folders / "v", 400, "is no adapter of the model"),
        ("x:y", folders / "c", 400, "an adapter cannot be called"),
    ):
        answer = server.post("/admin/adapters/load", model="writer", name=name, path=str(path))
        assert message in answer.text
        assert answer.status_code == status
    assert len(server.get("/admin/adapters").json()["adapters"]) == 3


def test_a_model_that_comes_back_has_the_adapters_that_were_loaded_beside_it(
    server: Server, folders: Path, expected: dict[str | None, str]
) -> None:
    server.post("/admin/adapters/load", model="writer", name="new", path=str(folders / "c"))
    server.post("/admin/adapters/unload", model="writer", name="a")
    assert server.post("/admin/models/unload", model="writer").status_code == 200
    assert server.post("/admin/models/load", model="writer").status_code == 200
    assert server.texts("writer:new") == [expected["c"]]
    assert server.post("/v1/completions", model="writer:a", **BODY).status_code == 404


def test_a_model_whose_own_name_has_a_colon_goes_before_an_adapter(folders: Path, tmp_path: Path) -> None:
    names = []
    for name in ("writer", "writer:a"):
        shutil.copytree(folders / "writer", tmp_path / name)
        names.append(str(tmp_path / name))
    adapters = {"writer:a": folders / "a", "writer:b": folders / "b"}
    engine = replace(OPTIONS, adapters=adapters)
    assert find_models(names[:1], ServeOptions(), engine).find_with_adapter("writer:a")[1] == "a"
    both = find_models(names, ServeOptions(), engine)
    entry, adapter = both.find_with_adapter("writer:a")
    assert (entry.name, adapter) == ("writer:a", None)
    assert both.names() == ["writer", "writer:a", "writer:b"]
    with pytest.raises(OptionError, match=r"'other:a' is of no model"):
        find_models(names[:1], ServeOptions(), replace(OPTIONS, adapters={"other:a": folders / "a"}))
    with pytest.raises(OptionError, match=r"'a' is of no model"):
        find_models(names, ServeOptions(), replace(OPTIONS, adapters={"a": folders / "a"}))


def test_adapters_of_one_model_keep_no_other_from_being_served(folders: Path, tmp_path: Path) -> None:
    random_encoder_decoder({**T5, "vocab_size": 300}).save_pretrained(tmp_path / "translator")
    (tmp_path / "translator" / "tokenizer.json").write_text(json.dumps(make_byte_tokenizer(300)))
    names = [str(folders / "writer"), str(tmp_path / "translator")]
    engine = replace(OPTIONS, context_length=128, adapters={"writer:a": folders / "a"})
    models = find_models(names, ServeOptions(), engine)
    models.set_up()
    asyncio.run(models.close())
    with pytest.raises(CheckpointError, match="a is no adapter of the model"):
        find_models(names, ServeOptions(), replace(engine, adapters={"translator:a": folders / "a"})).set_up()


def test_a_classifier_answers_with_the_head_of_its_adapter(tmp_path: Path) -> None:
    import transformers

    judge = save_bert_head(tmp_path / "judge", "ForSequenceClassification", labels=("bad", "so", "good"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(judge)
    make_adapter(tmp_path / "strict", model, "bert classifier", seed=1)
    arguments = ["convert", str(judge), "--to", "safetensors", "--output", str(tmp_path / "merged")]
    assert main([*arguments, "--adapter", str(tmp_path / "strict")]) == 0
    server = Server([judge, tmp_path / "merged"], {"judge:strict": tmp_path / "strict"})
    try:
        texts = ["the cat sat.", "Ada was born in London"]
        answers = [
            server.post("/v1/classify", model=model, input=texts).json()["data"]
            for model in ("judge", "judge:strict", "merged")
        ]
    finally:
        server.close()
    for plain, adapted, merged in zip(*answers, strict=True):
        assert adapted["probabilities"] == pytest.approx(merged["probabilities"], abs=1e-5)
        assert adapted["probabilities"] != pytest.approx(plain["probabilities"], abs=1e-2)


def test_generate_takes_an_adapter(
    folders: Path, expected: dict[str | None, str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(folders / "writer"), PROMPT, "--max-tokens", "24", "--context-length", "256"]
    assert main([*arguments, "--adapter", str(folders / "a")]) == 0
    written = capsys.readouterr().out.removesuffix("\n")
    assert written
    assert expected["a"].startswith(written)
    assert main([*arguments, "--adapter", str(folders / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert main([*arguments, "--adapter", str(folders / "wide")]) == 0  # whatever its rank
    assert main([*arguments, "--max-adapter-rank", "2"]) == 2
    assert "no option is named --max-adapter-rank" in capsys.readouterr().err


def test_an_adapter_option_that_says_no_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("legal", "=x", "legal="):
        assert main(["serve", "no-such-model", "--offline", "--adapter", text]) == 2
        assert "is not of the form NAME=DIR" in capsys.readouterr().err
