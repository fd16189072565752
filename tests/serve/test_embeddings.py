"""/v1/embeddings, /v1/score and /v1/rerank with a real encoder, against LLM.embed."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from fastserve import LLM
from fastserve.config import EngineOptions
from fastserve.engine.async_encoder import AsyncEncoder
from fastserve.errors import ClosedError, QueueFullError, StepError
from fastserve.serve.api_keys import ApiKeys
from fastserve.serve.app import create_app
from fastserve.serve.key_file import Terms, add_key
from fastserve.serve.model_loading import open_model

pytest.importorskip("fastserve._native")

NAME = "all-minilm-l6-v2"
TEXTS = ["a cat", "a kitten", "the stock market fell sharply today"]


class Client:
    def __init__(self, encoder: AsyncEncoder, keys: ApiKeys | None = None) -> None:
        self.loop = asyncio.new_event_loop()
        self.app = create_app([encoder], keys=ApiKeys({}) if keys is None else keys)
        transport = httpx.ASGITransport(app=self.app)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://localhost")
        self.encoder = encoder

    def post(self, path: str, **body) -> httpx.Response:
        return self.run(self.client.post(path, json={"model": NAME, **body}))

    def run(self, awaitable):
        async def main():
            return await awaitable

        return self.loop.run_until_complete(asyncio.wait_for(main(), 60))


@pytest.fixture(scope="module")
def client(model_dir) -> Iterator[Client]:
    encoder = open_model(model_dir(NAME), EngineOptions(threads=1, max_waiting=8), name=NAME)
    assert isinstance(encoder, AsyncEncoder)
    client = Client(encoder)
    yield client
    client.run(encoder.close())
    client.loop.close()


@pytest.fixture(scope="module")
def expected(model_dir) -> np.ndarray:
    with LLM(model_dir(NAME), threads=1) as llm:
        return llm.embed(TEXTS)


def test_embeddings_are_those_of_llm_as_floats_and_as_base64(client, expected) -> None:
    floats = client.post("/v1/embeddings", input=TEXTS).json()
    assert [item["index"] for item in floats["data"]] == [0, 1, 2]
    vectors = np.array([item["embedding"] for item in floats["data"]], np.float32)
    np.testing.assert_array_equal(vectors, expected)
    coded = client.post("/v1/embeddings", input=TEXTS, encoding_format="base64").json()
    vectors = np.stack([np.frombuffer(base64.b64decode(x["embedding"]), "<f4") for x in coded["data"]])
    np.testing.assert_array_equal(vectors, expected)
    assert coded["usage"] == floats["usage"]
    assert floats["usage"]["prompt_tokens"] > len(TEXTS)


def test_tokens_of_texts_that_are_embedded_are_counted(client) -> None:
    def counted() -> float:
        text = client.run(client.client.get("/metrics")).text
        count = f'fastserve_prompt_tokens_total{{model="{NAME}"}} '
        return float(text.split(count)[1].split()[0]) if count in text else 0.0

    before = counted()
    usage = client.post("/v1/embeddings", input=TEXTS).json()["usage"]
    assert counted() - before == usage["prompt_tokens"]


def test_token_ids_embed_as_their_text(client, expected) -> None:
    tokens = client.post("/tokenize", prompt=TEXTS[0]).json()["tokens"]
    for given in (tokens, [tokens]):
        data = client.post("/v1/embeddings", input=given).json()["data"]
        np.testing.assert_array_equal(np.array(data[0]["embedding"], np.float32), expected[0])


def test_fewer_dimensions_are_the_first_ones_normalized(client, expected) -> None:
    data = client.post("/v1/embeddings", input=TEXTS[0], dimensions=16).json()["data"]
    short = expected[0, :16] / np.linalg.norm(expected[0, :16])
    np.testing.assert_allclose(data[0]["embedding"], short, rtol=1e-6)
    response = client.post("/v1/embeddings", input=TEXTS[0], dimensions=385)
    assert response.status_code == 400
    assert "at most 384" in response.json()["error"]["message"]


def test_a_text_that_is_too_long_is_refused_unless_it_may_be_cut(client) -> None:
    long = "word " * 400
    response = client.post("/v1/embeddings", input=long)
    assert response.status_code == 400
    assert "embeds at most 256" in response.json()["error"]["message"]
    response = client.post("/v1/embeddings", input=long, truncate=True)
    assert response.json()["usage"]["prompt_tokens"] == 256


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/embeddings", {"input": "word " * 400}, "input"),
        ("/v1/embeddings", {"input": ["a", "word " * 400]}, "input[1]"),
        ("/v1/embeddings", {"input": [[101], [101, 99999]]}, "input[1][1]"),
        ("/v1/embeddings", {"input": [101, 99999]}, "input[1]"),
        ("/v1/embeddings", {"input": [101] * 257}, "input"),
        ("/v1/embeddings", {"input": ["a"] * 257}, "input[256]"),
        ("/v1/embeddings", {"input": "a", "dimensions": 385}, "dimensions"),
        ("/v1/score", {"text_1": "a", "text_2": ["a", "word " * 400]}, "text_2[1]"),
        ("/v1/rerank", {"query": "word " * 400, "documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "a", "documents": ["word " * 400]}, "documents[0]"),
    ],
)
def test_a_text_that_is_refused_is_named(client, path: str, fields, param: str) -> None:
    response = client.post(path, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_scores_are_cosines(client, expected) -> None:
    cosines = expected @ expected.T
    one_to_many = client.post("/v1/score", text_1=TEXTS[0], text_2=TEXTS).json()["data"]
    np.testing.assert_allclose([item["score"] for item in one_to_many], cosines[0], atol=1e-5)
    pairs = client.post("/v1/score", text_1=TEXTS, text_2=TEXTS[::-1]).json()["data"]
    np.testing.assert_allclose([item["score"] for item in pairs], np.diag(cosines[:, ::-1]), atol=1e-5)
    response = client.post("/v1/score", text_1=TEXTS[:2], text_2=TEXTS)
    assert "text_1 has 2 texts for 3 of text_2" in response.json()["error"]["message"]


def test_reranking_sorts_documents_by_what_they_have_in_common_with_the_query(client) -> None:
    documents = [TEXTS[2], TEXTS[1]]
    results = client.post("/v1/rerank", query=TEXTS[0], documents=documents).json()["results"]
    assert [result["index"] for result in results] == [1, 0]
    assert results[0]["document"] == {"text": TEXTS[1]}
    best = client.post("/v1/rerank", query="a cat", documents=documents, top_n=1, return_documents=False)
    assert best.json()["results"] == [{k: results[0][k] for k in ("index", "relevance_score")}]


def test_an_encoder_does_not_generate(client) -> None:
    response = client.post("/v1/completions", prompt="a")
    assert response.status_code == 400
    assert "it does not generate text" in response.json()["error"]["message"]


def test_calls_that_run_together_get_what_each_gets_alone(client, expected) -> None:
    encode = client.encoder.model.tokenizer.encode

    async def main() -> None:
        calls = [client.encoder.embed([encode(text) for text in TEXTS * times]) for times in (40, 1, 3)]
        for times, vectors in zip((40, 1, 3), await asyncio.gather(*calls), strict=True):
            np.testing.assert_array_equal(vectors, np.tile(expected, (times, 1)))

    client.run(main())


def test_a_short_call_does_not_wait_for_a_long_one(client) -> None:
    encode = client.encoder.model.tokenizer.encode

    async def main() -> None:
        long = asyncio.create_task(client.encoder.embed([encode("word " * 200)] * 200))
        await asyncio.sleep(0)
        await client.encoder.embed([encode("a cat")])
        assert not long.done()
        long.cancel()

    client.run(main())


def test_calls_beyond_the_queue_are_refused_and_cancelled_ones_leave_it(client) -> None:
    async def main() -> None:
        calls = [asyncio.create_task(client.encoder.embed([[101, 102]] * 50)) for _ in range(8)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="8 requests wait; max_waiting is 8"):
            await client.encoder.embed([[101, 102]])
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert client.encoder.num_unfinished == 0
        await client.encoder.embed([[101, 102]])

    client.run(main())


def test_an_encoder_is_late_only_while_it_has_work(client, monkeypatch) -> None:
    encoder = client.encoder
    run, is_running, may_end = encoder._encoder.run, threading.Event(), threading.Event()

    def wait(group):
        is_running.set()
        may_end.wait(20)
        return run(group)

    monkeypatch.setattr(encoder._encoder, "run", wait)

    async def main() -> None:
        await asyncio.sleep(0.5)
        assert encoder.seconds_without_step == 0
        call = asyncio.create_task(encoder.embed([[101, 102]]))
        await asyncio.to_thread(is_running.wait, 20)
        assert encoder.seconds_without_step < 0.5
        await asyncio.sleep(0.5)
        assert encoder.seconds_without_step >= 0.5
        may_end.set()
        await call
        assert encoder.seconds_without_step == 0

    client.run(main())


def test_a_step_that_fails_fails_its_calls_and_no_others(client, monkeypatch) -> None:
    run = client.encoder._encoder.run

    def fail(group):
        monkeypatch.setattr(client.encoder._encoder, "run", run)
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(client.encoder._encoder, "run", fail)

    async def main() -> None:
        with pytest.raises(StepError, match="a kernel failed"):
            await client.encoder.embed([[101, 102]])
        assert (await client.encoder.embed([[101, 102]])).shape == (1, 384)

    client.run(main())


def test_what_waits_when_an_encoder_is_closed_ends_with_an_error(model_dir) -> None:
    encoder = open_model(model_dir(NAME), EngineOptions(threads=1), name=NAME)
    assert isinstance(encoder, AsyncEncoder)

    async def main() -> None:
        call = asyncio.create_task(encoder.embed([[101, *[2000] * 250, 102]] * 500))
        await asyncio.sleep(0.05)
        await encoder.close()
        with pytest.raises(ClosedError):
            await call
        with pytest.raises(ClosedError):
            await encoder.embed([[101, 102]])

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.fixture
def limited(client, tmp_path) -> Iterator[Client]:
    """The same encoder for a tenant of 100 tokens a minute."""
    key = add_key(tmp_path / "keys", "a", terms=Terms(tokens_per_minute=100))
    limited = Client(client.encoder, ApiKeys({}, key_file=tmp_path / "keys"))
    limited.loop.close()
    limited.loop = client.loop
    limited.client.headers["x-api-key"] = key
    return limited


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": ["a cat"] * 20}),
        ("/v1/score", {"text_1": "a cat", "text_2": ["a kitten"] * 20}),
        ("/v1/rerank", {"query": "a cat", "documents": ["a kitten"] * 20}),
    ],
)
def test_texts_count_as_their_tenants_tokens_and_seconds_of_service(limited, path, body) -> None:
    tokens = limited.post(path, **body).json()["usage"]["prompt_tokens"]
    (tenant,) = limited.app.state.service.tenants
    usage = tenant.usage
    assert (usage.requests, usage.prompt_tokens, usage.completion_tokens) == (1, tokens, 0)
    assert usage.service_seconds > 0
    refused = limited.post(path, **body)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert f"{tokens} are asked for" in refused.json()["error"]["message"]
    assert usage.requests == 1
    assert tenant.num_running == 0
