"""A folder of every family of encoders, with settings of sentence-transformers: embeddings from the command
line and over HTTP are those of `transformers`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from family_table import CONFIGS, save_tokenizer

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.cli.main import main
from fastserve.config import EngineOptions
from fastserve.engine.async_encoder import AsyncEncoder
from fastserve.models.family import ENCODER_FAMILIES
from fastserve.serve.api_keys import ApiKeys
from fastserve.serve.app import create_app
from fastserve.serve.model_loading import open_model
from fastserve.types import Float32Array
from parity import range_error
from tiny_encoders import hf_encoder, hf_vectors

F16_KV_BOUND = 1e-3  # keys and values are float16 where nothing else is asked for

TEXTS = ["A cat.", "a kitten sat", "x"]


def save(model_type: str, folder: Path) -> Float32Array:
    """Save a random model that embeds by its first token, scaled to length 1; what it computes of TEXTS."""
    model = hf_encoder(CONFIGS[model_type])
    model.save_pretrained(folder)
    save_tokenizer(folder, is_encoder=True)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(folder))
    vectors = np.stack([hf_vectors(model, tokenizer.encode(text))[0] for text in TEXTS])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("model_type", ENCODER_FAMILIES)
def test_the_command_gives_the_embeddings_of_transformers(
    model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = save(model_type, tmp_path)
    assert main(["embed", str(tmp_path), *TEXTS, "--json"]) == 0
    embeddings = json.loads(capsys.readouterr().out)["embeddings"]
    assert range_error(np.array(embeddings, np.float32), expected) < F16_KV_BOUND


def serve_embeddings(folder: Path, texts: list[str]) -> Float32Array:
    """What /v1/embeddings answers."""

    async def ask() -> httpx.Response:
        encoder = open_model(folder, EngineOptions(threads=1), name="encoder")
        assert isinstance(encoder, AsyncEncoder)
        app = create_app([encoder], keys=ApiKeys({}))
        transport = httpx.ASGITransport(app=app)
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.post("/v1/embeddings", json={"model": "encoder", "input": texts})
        finally:
            await encoder.close()

    answer = asyncio.run(ask())
    assert answer.status_code == 200, answer.text
    return np.array([entry["embedding"] for entry in answer.json()["data"]], np.float32)


@pytest.mark.parametrize("model_type", ["mpnet", "modernbert"])
def test_the_server_gives_the_embeddings_of_transformers(model_type: str, tmp_path: Path) -> None:
    expected = save(model_type, tmp_path)
    assert range_error(serve_embeddings(tmp_path, TEXTS), expected) < F16_KV_BOUND


@pytest.mark.slow
def test_a_real_mpnet_knows_which_texts_are_alike(model_dir: Callable[[str], Path]) -> None:
    texts = ["a cat", "a kitten", "the stock market fell sharply today"]
    cat, kitten, market = serve_embeddings(model_dir("all-mpnet-base-v2"), texts)
    assert cat @ kitten > 0.7
    assert cat @ market < 0.2
