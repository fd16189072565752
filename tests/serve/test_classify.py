"""/v1/classify, /v1/token-classify, /v1/relations and /v1/answer, against fastserve.pipeline."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import fastserve
from fastserve.config import EngineOptions
from fastserve.engine.async_encoder import AsyncEncoder
from fastserve.serve.api_keys import ApiKeys
from fastserve.serve.app import create_app
from fastserve.serve.key_file import Terms, add_key
from fastserve.serve.model_loading import open_model
from fastserve.serve.options import ServeOptions
from fastserve.tune.ensemble import make_ensemble
from tiny_heads import save_bert_head, save_roberta_head

pytest.importorskip("fastserve._native")

TEXTS = ["the cat sat.", "Ada Lovelace was born in London", "?"]
LONG = "cat " * 200
RELATION = {"text": TEXTS[1], "head": {"start": 0, "end": 12}, "tail": {"start": 25, "end": 31}}
TASKS = {
    "sentiment": "text-classification",
    "topics": "text-classification",
    "pairs": "pair-classification",
    "ner": "token-classification",
    "relation": "relation-extraction",
    "qa": "question-answering",
    "choice": "multiple-choice",
    "both": "text-classification",
    "both-ner": "token-classification",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("heads")
    sequence = "ForSequenceClassification"
    tags = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    cards = {name: {"task": task} for name, task in TASKS.items()}
    several = {"labels": ("a", "b", "c"), "problem_type": "multi_label_classification"}
    saved = {
        "sentiment": save_bert_head(root / "sentiment", sequence, labels=("bad", "good")),
        "topics": save_bert_head(root / "topics", sequence, card=cards["topics"], **several),
        "pairs": save_bert_head(root / "pairs", sequence, labels=("no", "yes"), card=cards["pairs"]),
        "ner": save_bert_head(root / "ner", "ForTokenClassification", labels=tags, card=cards["ner"]),
        "relation": save_bert_head(root / "relation", sequence, labels=("r", "s"), card=cards["relation"]),
        "qa": save_bert_head(root / "qa", "ForQuestionAnswering", card=cards["qa"]),
        "choice": save_bert_head(root / "choice", "ForMultipleChoice", card=cards["choice"]),
    }
    others = {
        "both": save_roberta_head(root / "sentiment2", sequence, labels=("good", "bad")),
        "both-ner": save_roberta_head(
            root / "ner2", "ForTokenClassification", labels=tags, card=cards["ner"]
        ),
    }
    for name, first in (("both", "sentiment"), ("both-ner", "ner")):
        saved[name] = make_ensemble([saved[first], others[name]], root / name).path
    return saved


class Client:
    def __init__(self, encoders: list[AsyncEncoder], keys: ApiKeys | None = None, **options: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.encoders = encoders
        self.app = create_app(encoders, ServeOptions(**options), keys=keys or ApiKeys({}))
        transport = httpx.ASGITransport(app=self.app)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://localhost")

    def post(self, path: str, model: str, **body: Any) -> httpx.Response:
        return self.run(self.client.post(path, json={"model": model, **body}))

    def get(self, path: str) -> httpx.Response:
        return self.run(self.client.get(path))

    def run(self, awaitable: Any) -> Any:
        async def main() -> Any:
            return await awaitable

        return self.loop.run_until_complete(asyncio.wait_for(main(), 60))


@pytest.fixture(scope="module")
def client(folders) -> Iterator[Client]:
    options = EngineOptions(threads=1, max_waiting=8)
    encoders = [open_model(path, options, name=name) for name, path in folders.items()]
    client = Client(encoders)  # type: ignore[arg-type]
    yield client
    for encoder in encoders:
        client.run(encoder.close())
    client.loop.close()


def predictions(response: httpx.Response) -> list[dict[str, Any]]:
    """Of an answer, what fastserve.pipeline gives; the objects' names and indices are checked."""
    assert response.status_code == 200, response.text
    document = response.json()
    assert document["usage"]["prompt_tokens"] == document["usage"]["total_tokens"]
    assert [one["index"] for one in document["data"]] == list(range(len(document["data"])))
    return [
        {key: value for key, value in one.items() if key not in ("object", "index")}
        for one in document["data"]
    ]


def test_the_models_say_what_they_are_for(client) -> None:
    listed = {model["id"]: model["task"] for model in client.get("/v1/models").json()["data"]}
    assert listed == TASKS


def test_classes_are_those_of_the_pipeline(client, folders) -> None:
    with fastserve.pipeline(None, folders["sentiment"], threads=1) as classify:
        assert predictions(client.post("/v1/classify", "sentiment", input=TEXTS)) == classify(TEXTS)
        assert predictions(client.post("/v1/classify", "sentiment", input=TEXTS[0])) == [classify(TEXTS[0])]
        answer = client.post("/v1/classify", "sentiment", input=LONG, truncate=True)
        assert predictions(answer) == [classify(LONG, truncate=True)]
        assert answer.json()["usage"]["prompt_tokens"] == 128
    with fastserve.pipeline(None, folders["topics"], threads=1) as classify:
        assert predictions(client.post("/v1/classify", "topics", input=TEXTS)) == classify(TEXTS)
    with fastserve.pipeline(None, folders["pairs"], threads=1) as classify:
        answer = client.post("/v1/classify", "pairs", input=TEXTS, text_pair=TEXTS[::-1])
        assert predictions(answer) == classify(TEXTS, TEXTS[::-1])


def test_an_ensemble_is_served_as_the_pipeline_has_it(client, folders) -> None:
    with fastserve.pipeline(None, folders["both"], threads=1) as classify:
        given = [*TEXTS, *TEXTS]
        answer = client.post("/v1/classify", "both", input=given)
        assert predictions(answer) == classify(given)
        one = client.post("/v1/classify", "sentiment", input=given)
        assert (
            answer.json()["usage"]["prompt_tokens"] > one.json()["usage"]["prompt_tokens"]
        )  # of all members
    with fastserve.pipeline(None, folders["both-ner"], threads=1) as tag:
        given = [*TEXTS, LONG, " "]
        assert predictions(client.post("/v1/token-classify", "both-ner", input=given)) == tag(given)
    refused = client.post("/v1/classify", "both", input=LONG)
    assert refused.status_code == 400
    assert client.post("/v1/embeddings", "both", input="a").status_code == 400


def test_tags_and_entities_are_those_of_the_pipeline(client, folders) -> None:
    with fastserve.pipeline("token-classification", folders["ner"], threads=1) as tag:
        given = [*TEXTS, LONG, " "]
        assert predictions(client.post("/v1/token-classify", "ner", input=given)) == tag(given)
        words = TEXTS[1].split()
        for tokens in (words, [words]):
            assert predictions(client.post("/v1/token-classify", "ner", tokens=tokens)) == tag([words])
    none = client.post("/v1/token-classify", "ner", input="")
    assert predictions(none) == [{"entities": [], "tokens": [], "tags": [], "scores": []}]


def test_relations_are_those_of_the_pipeline(client, folders) -> None:
    with fastserve.pipeline(None, folders["relation"], threads=1) as relate:
        expected = relate(**RELATION)
    assert predictions(client.post("/v1/relations", "relation", input=RELATION)) == [expected]
    assert predictions(client.post("/v1/relations", "relation", input=[RELATION] * 2)) == [expected] * 2


def test_answers_and_choices_are_those_of_the_pipeline(client, folders) -> None:
    questions, context = ["who was born?", "who sat?"], " ".join(TEXTS * 20)
    with fastserve.pipeline(None, folders["qa"], threads=1) as answer:
        one = client.post("/v1/answer", "qa", question=questions[0], context=context)
        assert predictions(one) == [answer(questions[0], context)]
        each = client.post(
            "/v1/answer", "qa", question=questions, context=[context, TEXTS[0]], can_be_unanswerable=False
        )
        assert predictions(each) == answer(questions, [context, TEXTS[0]], can_be_unanswerable=False)
    with fastserve.pipeline(None, folders["choice"], threads=1) as choose:
        found = choose(questions[0], TEXTS)
    expected = {("answer" if key == "text" else key): value for key, value in found.items()}
    assert predictions(client.post("/v1/answer", "choice", question=questions[0], choices=TEXTS)) == [
        expected
    ]
    both = client.post("/v1/answer", "choice", question=questions, choices=[TEXTS, TEXTS])
    assert predictions(both)[0] == expected


@pytest.mark.parametrize(
    ("path", "model", "fields", "param"),
    [
        ("/v1/classify", "sentiment", {"input": LONG}, "input"),
        ("/v1/classify", "sentiment", {"input": ["a", LONG]}, "input[1]"),
        ("/v1/classify", "sentiment", {"input": ["a"] * 257}, "input[256]"),
        ("/v1/classify", "sentiment", {"input": []}, "input"),
        ("/v1/classify", "sentiment", {"input": "a", "text_pair": ["a", "b"]}, "text_pair"),
        ("/v1/classify", "pairs", {"input": "a"}, "text_pair"),
        ("/v1/classify", "sentiment", {"input": "a", "labels": ["b"]}, "labels"),
        ("/v1/classify", "ner", {"input": "a"}, "model"),
        ("/v1/token-classify", "sentiment", {"input": "a"}, "model"),
        ("/v1/token-classify", "ner", {}, "input"),
        ("/v1/token-classify", "ner", {"input": "a", "tokens": ["a"]}, "input"),
        ("/v1/token-classify", "ner", {"input": "a", "stride": -1}, "stride"),
        (
            "/v1/relations",
            "relation",
            {"input": {**RELATION, "tail": {"start": 25, "end": 99}}},
            "input.tail",
        ),
        (
            "/v1/relations",
            "relation",
            {"input": [RELATION, {**RELATION, "head": RELATION["tail"]}]},
            "input[1].tail",
        ),
        ("/v1/answer", "qa", {"question": "a"}, "context"),
        ("/v1/answer", "qa", {"question": "a", "context": ""}, "context"),
        ("/v1/answer", "qa", {"question": LONG, "context": "a"}, "context"),
        ("/v1/answer", "qa", {"question": "a", "context": ["a", "b"]}, "context"),
        ("/v1/answer", "qa", {"question": "a", "context": "a", "max_answer_tokens": 0}, "max_answer_tokens"),
        ("/v1/answer", "qa", {"question": "a", "context": "a", "truncate": True}, "truncate"),
        ("/v1/answer", "qa", {"question": "a", "choices": ["a", "b"]}, "model"),
        ("/v1/answer", "choice", {"question": "a", "choices": ["a"]}, "choices"),
        ("/v1/answer", "choice", {"question": "a", "choices": ["a", "b"], "stride": 1}, "stride"),
        ("/v1/embeddings", "sentiment", {"input": "a"}, "model"),
        ("/v1/completions", "sentiment", {"prompt": "a"}, "model"),
    ],
)
def test_what_is_refused_is_named(client, path: str, model: str, fields: dict[str, Any], param: str) -> None:
    response = client.post(path, model, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_a_model_that_is_not_there_is_not_found(client) -> None:
    assert client.post("/v1/classify", "nobody", input="a").status_code == 404


def test_requests_of_several_models_run_together_and_get_what_each_gets_alone(client) -> None:
    bodies = [
        ("/v1/classify", {"model": "sentiment", "input": TEXTS * 20}),
        ("/v1/token-classify", {"model": "ner", "input": TEXTS * 10}),
        ("/v1/classify", {"model": "sentiment", "input": TEXTS}),
        ("/v1/answer", {"model": "qa", "question": "who?", "context": LONG}),
    ]

    async def post(path: str, body: dict[str, Any]) -> Any:
        return (await client.client.post(path, json=body)).json()

    async def together() -> list[Any]:
        return await asyncio.gather(*(post(*one) for one in bodies))

    assert client.run(together()) == [client.run(post(*one)) for one in bodies]


def test_a_client_that_goes_away_leaves_no_work(client) -> None:
    encoder = next(encoder for encoder in client.encoders if encoder.name == "ner")
    ran: list[int] = []
    run = encoder._encoder.run

    def count(inputs: Any) -> Any:
        ran.append(len(inputs))
        return run(inputs)

    encoder._encoder.run = count  # type: ignore[method-assign]

    async def main() -> None:
        body = {"model": "ner", "input": [LONG] * 250}
        call = asyncio.create_task(client.client.post("/v1/token-classify", json=body))
        while not ran:
            await asyncio.sleep(0.001)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await asyncio.sleep(0.3)
        assert encoder.num_unfinished == 0
        done = sum(ran)
        await asyncio.sleep(0.1)
        assert sum(ran) == done < 500

    try:
        client.run(main())
    finally:
        encoder._encoder.run = run  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("path", "model", "body"),
    [
        ("/v1/classify", "sentiment", {"input": ["a cat"] * 20}),
        ("/v1/token-classify", "ner", {"input": ["a cat"] * 20}),
        ("/v1/relations", "relation", {"input": [RELATION] * 5}),
        ("/v1/answer", "qa", {"question": "who?", "context": LONG}),
    ],
)
def test_texts_count_as_their_tenants_tokens(client, tmp_path, path: str, model: str, body) -> None:
    key = add_key(tmp_path / "keys", "a", terms=Terms(tokens_per_minute=600))
    limited = Client(client.encoders, ApiKeys({}, key_file=tmp_path / "keys"))
    limited.loop.close()
    limited.loop = client.loop
    limited.client.headers["x-api-key"] = key
    tokens = 0
    while (response := limited.post(path, model, **body)).status_code == 200:
        tokens += response.json()["usage"]["prompt_tokens"]
    assert response.status_code == 429
    assert response.json()["error"]["code"] == "rate_limit_exceeded"
    (tenant,) = limited.app.state.service.tenants
    assert tenant.usage.prompt_tokens == tokens > 0
    assert tenant.usage.service_seconds > 0
    assert tenant.num_running == 0
    text = limited.get("/metrics").text
    assert f'fastserve_prompt_tokens_total{{model="{model}"}} {float(tokens)}' in text


def test_a_text_with_more_tokens_than_a_request_may_have_is_refused_windows_and_all(client) -> None:
    limited = Client(client.encoders, max_prompt_tokens=150)
    limited.loop.close()
    limited.loop = client.loop
    response = limited.post("/v1/token-classify", "ner", input=["a", LONG])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "input[1]"
    assert "max_prompt_tokens is 150" in response.json()["error"]["message"]
