from __future__ import annotations

import pytest

from fastserve.config import EngineOptions, parse_bytes
from fastserve.errors import OptionError


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1048576", 2**20),
        ("2GiB", 2**31),
        ("1.5 gib", 3 * 2**29),
        ("512MiB", 2**29),
        ("3 kB", 3000),
        (" 7 ", 7),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, num_bytes: int) -> None:
    assert parse_bytes("kv_memory", text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "2 GiX", "-1", "1e9", "two"])
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(OptionError, match="kv_memory="):
        parse_bytes("kv_memory", text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weights", "int3"),
        ("kv_dtype", "f8"),
        ("backend", "cuda"),
        ("device", 0),
        ("device", "cuda"),  # which the native backend has not
        ("threads", 0),
        ("context_length", -5),
        ("max_batch_tokens", 0),
        ("max_sequences", 1.5),
        ("prefill_chunk_tokens", True),
        ("kv_memory", 0),
        ("kv_memory", "0 MiB"),
        ("kv_spill", -1),
        ("kv_spill", 0.5),
        ("kv_spill", "much"),
        ("spill_dir", 3),
        ("speculation", "magic"),
        ("max_draft_tokens", 0),
        ("max_draft_tokens", 65),
        ("prompt_lookup_min", 0),
        ("prompt_lookup_max", 1),  # below prompt_lookup_min
        ("prompt_lookup_max", 2.5),
        ("draft_model", 3),
        ("draft_weights", "int3"),
        ("draft_layers", 0),
        ("draft_kv_memory", "0 MiB"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name_and_value(name: str, value: object) -> None:
    with pytest.raises(OptionError, match=f"{name}="):
        EngineOptions(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "kinds"),
    [
        ("max_draft_tokens", 4, {"prompt-lookup", "draft"}),
        ("prompt_lookup_min", 1, {"prompt-lookup"}),
        ("prompt_lookup_max", 5, {"prompt-lookup"}),
        ("draft_model", "a", {"draft"}),
        ("draft_layers", 3, {"draft"}),
        ("draft_weights", "int4", {"draft"}),
        ("draft_kv_memory", "1MiB", {"draft"}),
    ],
)
def test_knobs_that_a_kind_of_speculation_has_no_use_for_are_refused(
    name: str, value: object, kinds: set[str]
) -> None:
    for kind in ("off", "prompt-lookup", "draft"):
        options = {"speculation": kind, name: value}
        if kind == "draft" and name not in ("draft_model", "draft_layers", "draft_weights"):
            options["draft_layers"] = 2
        if kind in kinds:
            assert getattr(EngineOptions(**options), name) == value
        else:
            with pytest.raises(OptionError, match=f"{name}={value!r} has no use with speculation='{kind}'"):
                EngineOptions(**options)


def test_a_model_that_would_be_its_own_draft_as_it_is_is_refused() -> None:
    with pytest.raises(OptionError, match="no draft model"):
        EngineOptions(speculation="draft")


@pytest.mark.parametrize(("size", "num_bytes"), [(None, None), (4096, 4096), ("1MiB", 2**20)])
def test_the_kv_memory_of_a_draft_model_is_a_size(size: int | str | None, num_bytes: int | None) -> None:
    options = EngineOptions(speculation="draft", draft_layers=1, draft_kv_memory=size)
    assert options.draft_kv_memory_bytes == num_bytes


@pytest.mark.parametrize(
    ("name", "value"), [("threads", 2), ("weights", "int8"), ("speculation", "prompt-lookup")]
)
def test_what_the_torch_backend_would_ignore_is_refused(name: str, value: object) -> None:
    with pytest.raises(OptionError, match=f"{name}={value!r} does not work with backend='torch'"):
        EngineOptions(backend="torch", **{name: value})


@pytest.mark.parametrize(
    ("kv_spill", "num_bytes"), [(None, 0), (0, 0), ("0", 0), (4096, 4096), ("1GiB", 2**30), ("1.5 kB", 1500)]
)
def test_kv_spill_is_a_size_or_off(kv_spill: int | str | None, num_bytes: int) -> None:
    assert EngineOptions(kv_spill=kv_spill).kv_spill_bytes == num_bytes


def test_a_folder_for_what_is_not_spilled_is_refused() -> None:
    with pytest.raises(OptionError, match="spill_dir='/data' has no use without kv_spill"):
        EngineOptions(spill_dir="/data")


def test_a_rank_of_adapters_that_there_is_no_room_for_is_refused() -> None:
    with pytest.raises(OptionError, match="max_adapter_rank=8 has no use") as error:
        EngineOptions(max_adapter_rank=8)
    assert error.value.hint == "name adapters, or set max_adapters"
    with pytest.raises(OptionError, match="max_adapter_rank=8 has no use"):
        EngineOptions(max_adapters=0, max_adapter_rank=8)
    for room in ({"max_adapters": 1}, {"adapters": {"a": "folder"}}):
        assert EngineOptions(**room, max_adapter_rank=8).max_adapter_rank == 8
