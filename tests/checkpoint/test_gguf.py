from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.checkpoint import open_checkpoint
from fastserve.checkpoint.gguf import GgufFile, StringArray, read_gguf
from fastserve.checkpoint.tensor import TensorFormat
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.errors import CheckpointError, FastServeError, UnsupportedError
from stored_tensors import random_stored

U32, U64 = "<I", "<Q"
HEADER = b"GGUF" + struct.pack(U32, 3)


def text(value: str) -> bytes:
    return struct.pack(U64, len(value.encode())) + value.encode()


def tensor_entry(name: str, shape: tuple[int, ...], code: int, offset: int) -> bytes:
    sizes = b"".join(struct.pack(U64, n) for n in reversed(shape))
    return text(name) + struct.pack(U32, len(shape)) + sizes + struct.pack("<IQ", code, offset)


def file_of(*entries: bytes, pairs: bytes = b"", num_pairs: int = 0, data: bytes = b"") -> bytes:
    head = HEADER + struct.pack("<QQ", len(entries), num_pairs) + pairs + b"".join(entries)
    return head + b"\0" * (-len(head) % 32) + data


def read(tmp_path: Path, content: bytes) -> GgufFile:
    path = tmp_path / "file.gguf"
    path.write_bytes(content)
    return read_gguf(path)


def assert_equals_library(path: Path) -> None:
    ours, library = read_gguf(path), GGUFReader(path)
    fields = {name: field for name, field in library.fields.items() if not name.startswith("GGUF.")}
    assert set(ours.metadata) == set(fields)
    for name, field in fields.items():
        value, expected = ours.metadata[name], field.contents()
        plain = list(value) if isinstance(value, StringArray | np.ndarray) else value
        assert plain == expected, name
    assert {t.name for t in library.tensors} == set(ours.tensors)
    for tensor in library.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.format.name == tensor.tensor_type.name
        assert list(mine.shape) == tensor.shape.tolist()[::-1]
        assert mine.data.tobytes() == tensor.data.tobytes()


def test_metadata_and_tensors_are_those_that_the_gguf_library_reads(shared_data: Path) -> None:
    assert_equals_library(shared_data / "model_stories260K" / "stories260K.gguf")
    assert_equals_library(shared_data / "tokenizer_vectors" / "ggml-vocab-bert-bge.gguf")


def test_every_type_of_metadata_value_is_read(tmp_path: Path) -> None:
    path = tmp_path / "types.gguf"
    writer = GGUFWriter(path, "none")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60_000)
    writer.add_int16("i16", -30_000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float32("f32", 0.1)
    writer.add_float64("f64", 0.1)
    writer.add_bool("bool", True)
    writer.add_string("text", "Zürich 東京")
    writer.add_array("texts", ["", "a", "東京"])
    writer.add_array("integers", [1, -2, 3])
    writer.add_array("floats", [0.5, 1.5])
    writer.add_array("flags", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert_equals_library(path)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_every_supported_tensor_type_is_mapped(write_gguf: Callable[..., Path], kind: str) -> None:
    tensors = {"a": np.ones((3, 64), np.float32), "b": np.arange(96, dtype=np.float32).reshape(3, 32)}
    assert_equals_library(write_gguf({}, tensors, kind=GGMLQuantizationType[kind]))


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"])
def test_types_that_the_library_only_reads_are_mapped(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    stored = random_stored(TensorFormat[kind], (3, 512))
    blocks = stored.data.reshape(3, -1)
    writer.add_tensor("a", blocks, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_equals_library(path)


def test_texts_of_an_array_can_be_indexed_and_sliced(write_gguf: Callable[..., Path]) -> None:
    texts = read_gguf(write_gguf({"t": ["a", "bc", "東"]}, {})).metadata.texts("t")
    assert texts is not None
    assert (texts[0], texts[-1], texts[1:], list(texts), len(texts)) == (
        "a", "東", ["bc", "東"], ["a", "bc", "東"], 3,
    )  # fmt: skip
    with pytest.raises(IndexError):
        texts[3]


def test_a_float32_is_read_as_the_shortest_decimal(write_gguf: Callable[..., Path]) -> None:
    metadata = read_gguf(write_gguf({"eps": 1e-5}, {})).metadata
    assert metadata["eps"] != 1e-5
    assert metadata.number("eps") == 1e-5


def test_a_value_of_the_wrong_type_is_named(write_gguf: Callable[..., Path]) -> None:
    metadata = read_gguf(write_gguf({"n": "many", "t": 3}, {})).metadata
    with pytest.raises(CheckpointError, match=r"n is many, an integer was expected"):
        metadata.integer("n")
    for getter in (metadata.text, metadata.flag, metadata.texts, metadata.array):
        with pytest.raises(CheckpointError, match="t is 3"):
            getter("t")


def test_smollm2_opens_within_its_budget(model_dir: Callable[[str], Path]) -> None:
    path = model_dir("smollm2-135m-instruct")

    def open_seconds() -> float:  # of the processor: other work on the machine does not count
        start = time.process_time()
        open_checkpoint(path)
        return time.process_time() - start

    assert min(open_seconds() for _ in range(5)) < 0.15


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"GGUF", "is truncated"),
        (b"GGML" + bytes(60), "is no GGUF file: it starts with b'GGML'"),
        (HEADER + struct.pack("<QQ", 2**63, 0), f"claims {2**63} tensors, the file has room for 0"),
        (HEADER + struct.pack("<QQ", 0, 10**6), "claims 1000000 key-value pairs, the file has room for 0"),
        (file_of(pairs=struct.pack(U64, 2**40) + bytes(20), num_pairs=1), "a key of 1099511627776 bytes"),
        (file_of(pairs=text("k") + struct.pack("<IQ", 8, 2**40), num_pairs=1), "is truncated: k at byte"),
        (file_of(pairs=text("k") + struct.pack("<IIQ", 9, 8, 2**60), num_pairs=1), "texts of k"),
        (file_of(pairs=text("k") + struct.pack("<IIQ", 9, 10, 5), num_pairs=1), "is truncated: k at byte"),
        (file_of(pairs=text("k") + struct.pack("<IIQQ", 9, 8, 1, 2**63), num_pairs=1), "1 texts at byte"),
        (file_of(pairs=text("k") + struct.pack("<II", 13, 0), num_pairs=1), "value type 13"),
        (file_of(pairs=text("k") + struct.pack("<IB", 7, 2), num_pairs=1), "boolean that is neither 0 nor 1"),
        (file_of(pairs=(text("k") + struct.pack("<IB", 0, 1)) * 2, num_pairs=2), "key 'k' is repeated"),
        (file_of(pairs=text("k") + struct.pack("<IQ", 8, 1) + b"\xff", num_pairs=1), "not valid UTF-8"),
        (
            file_of(pairs=text("general.alignment") + struct.pack("<II", 4, 24), num_pairs=1),
            "general.alignment is 24, a power of two",
        ),
        (file_of(tensor_entry("t", (4,), 0, 0)), "is truncated: tensor 't' ends at byte"),
        (file_of(tensor_entry("t", (2**63, 2**63), 0, 0)), "is truncated: tensor 't' ends at byte"),
        (file_of(tensor_entry("t", (4,), 0, 2**63)), "is truncated: tensor 't' ends at byte"),
        (file_of(tensor_entry("t", (4,), 0, 8), data=bytes(64)), "has offset 8, a multiple of 32"),
        (file_of(tensor_entry("t", (0, 4), 0, 0), data=bytes(64)), r"shape \[0, 4\], an empty dimension"),
        (file_of(tensor_entry("t", (1,) * 5, 0, 0), data=bytes(64)), "has 5 dimensions"),
        (file_of(tensor_entry("t", (), 0, 0), data=bytes(64)), "has 0 dimensions"),
        (file_of(tensor_entry("t", (2, 33), 8, 0), data=bytes(99)), "rows of 33 elements, Q8_0 needs"),
        (
            file_of(tensor_entry("a", (9,), 0, 0), tensor_entry("b", (8,), 0, 32), data=bytes(96)),
            "tensors 'a' and 'b' overlap",
        ),
        (
            file_of(tensor_entry("a", (8,), 0, 0), tensor_entry("a", (8,), 0, 32), data=bytes(96)),
            "tensor 'a' is repeated",
        ),
    ],
)  # fmt: skip
def test_a_corrupt_file_is_refused_by_file_value_and_limit(
    tmp_path: Path, content: bytes, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, content)
    assert "file.gguf" in str(caught.value)
    assert "download the model again" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF" + struct.pack(U32, 1) + bytes(16), "GGUF version 1, supported are 2 and 3"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "GGUF version 3, big-endian"),
        (
            file_of(tensor_entry("t", (256,), 23, 0), data=bytes(136)),
            "'t' has type IQ4_XS, supported are F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K",
        ),
        (file_of(tensor_entry("t", (8,), 99, 0), data=bytes(64)), "'t' has type 99"),
        (file_of(pairs=text("k") + struct.pack("<IIQ", 9, 9, 0), num_pairs=1), "array of arrays"),
    ],
)
def test_what_we_do_not_have_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        read(tmp_path, content)


def test_a_file_cut_anywhere_is_refused(write_tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    whole = write_tiny_llama(metadata={"tokenizer.ggml.tokens": ["a", "b"]}).read_bytes()
    header_end = whole.index(b"ffn_down") + 200
    cuts = [*range(0, header_end, 7), *range(header_end, len(whole), 4099), len(whole) - 64]
    for cut in cuts:
        with pytest.raises(CheckpointError):
            read(tmp_path, whole[:cut])


@given(data=st.data())
@settings(deadline=1000, max_examples=300)
def test_a_damaged_header_never_raises_anything_but_our_errors(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, shared_data: Path
) -> None:
    original = (shared_data / "model_stories260K" / "stories260K.gguf").read_bytes()
    header = bytearray(original[:14_272])  # where its tensors begin
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(header) - 8) | st.integers(0, 1200))
        damage = data.draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, bytes(8)]))
        header[position : position + len(damage)] = damage
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(bytes(header) + original[len(header) :])
    try:
        checkpoint = open_checkpoint(path)
        for tensor in checkpoint.tensors.values():
            assert len(tensor.data) == tensor.format.num_bytes(tensor.shape)
        Tokenizer.from_checkpoint(checkpoint).encode("Once upon a time")
    except FastServeError:
        pass
