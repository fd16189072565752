from __future__ import annotations

import hashlib
import heapq
import json
import lzma
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fastserve.checkpoint import archive_reader, open_checkpoint
from fastserve.checkpoint.archive import ArchiveSizes, write_archive
from fastserve.checkpoint.archive_codebook import k_means, make_codebook
from fastserve.checkpoint.archive_coding import Coder, Plane, entropy_bits, join, plan_plane, split
from fastserve.checkpoint.archive_expansion import ARCHIVE_FILE, expanded_folder, prune_expanded
from fastserve.checkpoint.archive_reader import Archive
from fastserve.checkpoint.bit_stream import pack_stream
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.errors import CheckpointError, DownloadError, FastServeError, OptionError, UnsupportedError
from fastserve.evaluate.random_model import SHAPES, write_random_model
from packed_model import pack_model, pruned, random_grouped

TINY = {**SHAPES["smollm2-135m"], "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"head_dim": 64, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTSERVE_HOME", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture(scope="module")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive") / "dense"
    write_random_model(TINY, folder)
    return folder


@pytest.fixture(scope="module")
def sparse_model(dense_model: Path) -> Path:
    """Half of the linears' weights are zero, the others have 4 bits in groups of 64; int8 embeddings."""

    def make(tensor: StoredTensor) -> GroupedTensor | None:
        if len(tensor.shape) != 2:
            return None
        is_table = "embed" in tensor.name
        return pruned(
            tensor,
            share_of_zeros=0.0 if is_table else 0.5,
            bits=8 if is_table else 4,
            group_size=0 if is_table else 64,
            scale_format=TensorFormat.BF16,
        )

    pack_model(dense_model, dense_model.parent / "sparse", make)
    return dense_model.parent / "sparse"


def digests(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def test_what_is_expanded_are_the_very_files(sparse_model: Path, tmp_path: Path) -> None:
    write_archive(sparse_model, tmp_path / "archive")
    checkpoint = open_checkpoint(tmp_path / "archive")
    assert digests(checkpoint.path) == digests(sparse_model)
    assert checkpoint.path.is_relative_to(expanded_folder())
    source = open_checkpoint(sparse_model)
    assert checkpoint.config == source.config
    for name, tensor in source.tensors.items():
        assert np.array_equal(to_f32(tensor), to_f32(checkpoint.tensors[name]))


def test_plain_floats_and_shards_are_kept_exactly(tmp_path: Path) -> None:
    folder, rng = tmp_path / "model", np.random.default_rng(0)
    folder.mkdir()
    shards = {
        "model-1.safetensors": {"a.weight": rng.normal(size=(300, 200)).astype(np.float32)},
        "model-2.safetensors": {
            "b.weight": rng.normal(size=(300, 200)).astype(np.float16),
            "c": np.full((), 2.5, np.float32),
            "empty": np.zeros((0, 4), np.float32),
        },
    }
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "note": "ä"}))
    sizes = write_archive(folder, tmp_path / "archive")
    assert digests(open_checkpoint(tmp_path / "archive").path) == digests(folder)
    assert sizes.file_bytes < 0.96 * sizes.source_bytes  # exponents
    assert json.loads((tmp_path / "archive" / "config.json").read_text())["model_type"] == "llama"


def order_0_bits(weight: GroupedTensor) -> float:
    """The entropy of a weight's codes, the zeros among them."""
    codes = weight.groups(0, weight.shape[0]).codes
    _, counts = np.unique(codes, return_counts=True)
    shares = counts / codes.size
    return float(-(shares * np.log2(shares)).sum())


@pytest.fixture(scope="module")
def large_sizes(tmp_path_factory: pytest.TempPathFactory) -> tuple[ArchiveSizes, Path]:
    """A model whose matrices have the sizes of real ones: 1 layer of 512, groups of 64."""
    folder = tmp_path_factory.mktemp("large")
    config = {**TINY, "hidden_size": 512, "head_dim": 128, "intermediate_size": 1408, "num_hidden_layers": 1}
    write_random_model({**config, "vocab_size": 1024}, folder / "dense")

    def make(tensor: StoredTensor) -> GroupedTensor | None:
        if len(tensor.shape) != 2:
            return None
        is_table = "embed" in tensor.name
        return pruned(
            tensor,
            share_of_zeros=0.0 if is_table else 0.5,
            bits=8 if is_table else 4,
            group_size=0 if is_table else 64,
            scale_format=TensorFormat.BF16,
        )

    pack_model(folder / "dense", folder / "sparse", make)
    return write_archive(folder / "sparse", folder / "archive"), folder / "sparse"


def test_a_sparse_model_of_4_bits_is_within_3_percent_of_its_entropy(
    large_sizes: tuple[ArchiveSizes, Path],
) -> None:
    sizes, folder = large_sizes
    assert sizes.entropy_bytes < sizes.file_bytes <= 1.03 * sizes.entropy_bytes
    tensors = open_checkpoint(folder).tensors
    linears = [w for w in sizes.weights if "proj" in w.name]
    assert len(linears) == 7
    for weight in linears:
        stored = tensors[weight.name]
        assert isinstance(stored, GroupedTensor)
        codes = order_0_bits(stored)
        assert abs(codes - 2.7) < 0.06  # half of them zero, a normal histogram beyond
        assert codes < weight.coded_bits < codes + 16 / 64  # and less than plain scales take
        assert weight.coded_bits <= 1.03 * weight.entropy_bits
    counts = [np.prod(w.shape) for w in linears]
    pruned_bits = sum(w.coded_bits * count for w, count in zip(linears, counts, strict=True)) / sum(counts)
    assert 16 / pruned_bits >= 5.3
    assert sizes.bf16_bytes / sizes.file_bytes >= 4
    assert sum(w.coded_bits * np.prod(w.shape) for w in sizes.weights) / 8 == pytest.approx(
        sizes.file_bytes, rel=0.02
    )


def huffman_lengths(counts: list[int]) -> list[int]:
    """Of each symbol's code (Huffman 1952)."""
    heap = [(count, index, (index,)) for index, count in enumerate(counts) if count]
    lengths = [0] * len(counts)
    heapq.heapify(heap)
    while len(heap) > 1:
        first, index, left = heapq.heappop(heap)
        second, _, right = heapq.heappop(heap)
        for symbol in (*left, *right):
            lengths[symbol] += 1
        heapq.heappush(heap, (first + second, index, (*left, *right)))
    return lengths


@pytest.mark.parametrize("zeros", [0.2, 0.5, 0.8, 0.95])
def test_the_coder_takes_no_more_than_huffman_codes_and_hardly_more_than_the_entropy(zeros: float) -> None:
    rng = np.random.default_rng(3)
    codes = np.clip(np.rint(rng.normal(0, 2.6, 200_000)), -8, 7).astype(np.int64) + 8
    codes[rng.random(len(codes)) < zeros] = 8
    data = pack_stream(codes.astype(np.uint8), 4)
    plane, bits = plan_plane(lambda: [data], is_stream=True)
    coded = Coder(plane).encode(data)
    counts = np.bincount(codes, minlength=16)
    entropy = entropy_bits(counts)
    huffman = sum(n * length for n, length in zip(counts, huffman_lengths(counts.tolist()), strict=True))
    assert entropy <= huffman < entropy + len(codes)
    assert 8 * len(coded) <= huffman * (1 + 1e-4)
    assert bits <= 8 * len(coded) + 1 <= 1.002 * bits + 64
    assert bits <= entropy * 1.0001  # pairs of codes, if they are taken, cannot take more
    assert np.array_equal(Coder(plane).decode(coded, len(data)), data)


@given(
    values=st.lists(st.integers(0, 255), max_size=200).map(lambda x: np.array(x, np.uint8)),
    repeat=st.sampled_from([1, 7, 60]),
    is_stream=st.booleans(),
    mask=st.sampled_from([0, 1, 15, 255]),
)
@settings(deadline=2000)
def test_planes_are_decoded_to_what_was_coded(
    values: np.ndarray, repeat: int, is_stream: bool, mask: int
) -> None:
    data = np.tile(values & np.uint8(mask), repeat)
    plane, _ = plan_plane(lambda: [data], is_stream=is_stream)
    coder = Coder(plane)
    assert np.array_equal(coder.decode(coder.encode(data), len(data)), data)


@given(
    dtype=st.sampled_from(["F32", "F16", "BF16", "U8", "I8", "I32", "U16", "U32", "I64", "BOOL"]),
    count=st.integers(0, 9),
    seed=st.integers(0, 9),
)
def test_planes_are_joined_to_what_was_split(dtype: str, count: int, seed: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, 8 * count).astype(np.uint8)
    assert np.array_equal(join(split(data, dtype), dtype), data)


def test_scales_have_a_plane_of_exponents() -> None:
    halves = (np.array([1.0, -1.5, 1.25, 0.5], np.float32).view(np.uint32) >> 16).astype("<u2")
    low, high = split(halves.view(np.uint8), "BF16")
    assert high.tolist() == [127, 127, 127, 126]
    assert low.tolist() == [0, 0b10000001, 0b1000000, 0]


def best_error(values: list[float], k: int) -> float:
    """Of the best codebook of k entries: by dynamic programming over ascending values."""
    count = len(values)

    def error(begin: int, end: int) -> float:
        return float(np.var(values[begin:end]) * (end - begin))

    best = [error(0, end) if end else 0.0 for end in range(count + 1)]
    for _ in range(k - 1):
        best = [
            min([best[end]] + [best[cut] + error(cut, end) for cut in range(1, end)])
            for end in range(count + 1)
        ]
    return best[count]


def test_k_means_finds_the_best_codebook_of_small_sets_or_nearly() -> None:
    for seed in range(12):
        values = np.sort(np.random.default_rng(seed).normal(size=40))
        centers = k_means(values, np.ones(40, np.int64), 5)
        error = float((np.abs(values[:, None] - centers).min(axis=1) ** 2).sum())
        assert best_error(values.tolist(), 5) - 1e-9 <= error <= 2 * best_error(values.tolist(), 5)


def test_k_means_ends_where_every_center_is_the_mean_of_its_values() -> None:
    values = np.unique(np.random.default_rng(1).normal(size=3000))
    weights = np.random.default_rng(2).integers(1, 9, len(values))
    centers = k_means(values, weights, 16)
    nearest = np.abs(values[:, None] - centers).argmin(axis=1)
    means = [np.average(values[nearest == i], weights=weights[nearest == i]) for i in range(16)]
    assert np.allclose(centers, means)
    assert np.array_equal(k_means(values, weights, 16), centers)
    uniform = np.linspace(values[0], values[-1], 16)
    assert ((values - centers[nearest]) ** 2 @ weights) < (
        0.7 * np.abs(values[:, None] - uniform).min(axis=1) ** 2 @ weights
    )


def test_a_codebook_of_a_normal_matrix_has_the_error_of_lloyd_and_max() -> None:
    """J. Max, Quantizing for minimum distortion, IRE Trans. 1960: 0.009497 of the variance for 16 levels."""
    values = np.random.default_rng(4).normal(size=400_000).astype(np.float32)
    codebook = make_codebook([values[:150_000], values[150_000:]], 16)
    error = float(np.mean((codebook.entries[codebook.indices(values)] - values) ** 2))
    assert error == pytest.approx(0.009497, rel=0.03)


def test_shared_floats_keep_their_zeros_and_take_the_bits_of_their_codebook(tmp_path: Path) -> None:
    folder, rng = tmp_path / "model", np.random.default_rng(0)
    folder.mkdir()
    values = rng.normal(size=(400, 500)).astype(np.float32)
    values[rng.random(values.shape) < 0.6] = 0
    norm = rng.normal(size=500).astype(np.float32)
    save_file({"a.weight": values, "norm.weight": norm}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    sizes = write_archive(folder, tmp_path / "archive", codebook_bits=4)
    expanded = load_file(open_checkpoint(tmp_path / "archive").path / "model.safetensors")
    found = expanded["a.weight"]
    assert np.array_equal(expanded["norm.weight"], norm)
    assert np.array_equal(found == 0, values == 0)
    assert len(np.unique(found)) == 16
    assert float(np.mean((found - values) ** 2) / np.mean(values**2)) < 0.03
    weight = next(w for w in sizes.weights if w.name == "a.weight")
    _, counts = np.unique(found, return_counts=True)
    assert weight.entropy_bits == pytest.approx(entropy_bits(counts) / found.size, rel=1e-6)
    assert weight.coded_bits <= 1.03 * weight.entropy_bits


# The store.


@pytest.fixture
def archive(sparse_model: Path, tmp_path: Path) -> Path:
    write_archive(sparse_model, tmp_path / "archive")
    return tmp_path / "archive"


@pytest.fixture
def expansions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that archives were expanded into."""
    folders: list[Path] = []
    write = Archive.write

    def count(self: Archive, folder: Path) -> None:
        folders.append(folder)
        time.sleep(0.05)
        write(self, folder)

    monkeypatch.setattr(Archive, "write", count)
    return folders


def entries() -> list[Path]:
    return sorted(expanded_folder().glob("*"))


def test_an_archive_is_expanded_once(archive: Path, expansions: list[Path]) -> None:
    first = open_checkpoint(archive)
    assert open_checkpoint(archive).path == first.path
    assert len(expansions) == len(entries()) == 1


def test_those_who_open_an_archive_at_the_same_time_expand_it_once(
    archive: Path, expansions: list[Path]
) -> None:
    with ThreadPoolExecutor(4) as threads:
        paths = set(threads.map(lambda _: open_checkpoint(archive).path, range(4)))
    assert len(expansions) == len(paths) == 1


def test_what_was_damaged_in_the_store_is_expanded_again(archive: Path, expansions: list[Path]) -> None:
    path = open_checkpoint(archive).path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    open_checkpoint(archive)
    assert len(expansions) == 2
    assert len(entries()) == 1


def test_what_is_stale_goes(archive: Path, sparse_model: Path, tmp_path: Path) -> None:
    first = open_checkpoint(archive).path
    (archive / "tokenizer.json").write_text((archive / "tokenizer.json").read_text() + "\n")
    second = open_checkpoint(archive).path
    assert second != first
    assert entries() == [second.parent]
    (archive / ARCHIVE_FILE).unlink()
    assert prune_expanded() > 0
    assert entries() == []


def test_an_expansion_that_fails_leaves_nothing(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastserve.hub.disk.shutil.disk_usage", lambda path: type("", (), {"free": 1000}))
    with pytest.raises(DownloadError, match=r"too full: .* needed, 0.0 MB free"):
        open_checkpoint(archive)
    assert entries() == []


# Bad input.


def test_without_constriction_the_remedy_is_named(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(UnsupportedError, match="archives need constriction") as caught:
        open_checkpoint(archive)
    assert caught.value.hint == "pip install 'fastserve-llm[compress]'"


def test_what_cannot_be_archived_is_refused(
    sparse_model: Path, tmp_path: Path, write_tiny_llama: Callable[..., Path]
) -> None:
    with pytest.raises(OptionError, match="is not an empty folder"):
        write_archive(sparse_model, sparse_model)
    with pytest.raises(OptionError, match="codebook_bits"):
        write_archive(sparse_model, tmp_path / "output", codebook_bits=9)
    with pytest.raises(UnsupportedError, match="is a GGUF file"):
        write_archive(write_tiny_llama(), tmp_path / "output")
    assert not (tmp_path / "output").exists()


def rewrite(archive: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the description of an archive."""
    parts = load_file(archive / ARCHIVE_FILE)
    document = json.loads(lzma.decompress(parts["description"].tobytes()))
    change(document)
    text = lzma.compress(json.dumps(document).encode())
    save_file({**parts, "description": np.frombuffer(text, np.uint8)}, archive / ARCHIVE_FILE)


def tensors_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [tensor for file in document["files"] for tensor in file["tensors"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["files"][0].update(sha256="0" * 64), "is expanded to other bytes than were archived"),
        (lambda d: d["files"][0].update(name="../x.safetensors"), "malformed: '../x.safetensors' is no name"),
        (lambda d: d["texts"].update({"/etc/x.json": "{}"}), "malformed: '/etc/x.json' is no name"),
        (lambda d: d["texts"].update({"config.json": 1}), "malformed: 1 is no text"),
        (lambda d: d["files"].pop(), "coded bytes are described, there are"),
        (lambda d: tensors_of(d)[0].update(bytes=2**60), "contradicts itself|claims to stand for"),
        (lambda d: tensors_of(d)[0].update(bytes=-1), "-1 is no count"),
        (lambda d: tensors_of(d)[0].update(entries=300, dtype="U8"), "malformed: a codebook of U8"),
        (lambda d: tensors_of(d)[0].update(planes=[]), "contradicts itself"),
        (lambda d: tensors_of(d)[0]["planes"][0].update(width=9), "malformed: the counts of a plane"),
        (lambda d: tensors_of(d)[0]["planes"][0].update(counts=[0] * 16), "the counts of a plane"),
        (lambda d: tensors_of(d)[0]["planes"][0].update(lengths=[]), "contradicts itself"),
        (lambda d: d.update(files=7), "malformed"),
        (lambda d: d.pop("texts"), "malformed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_description_that_cannot_be_is_named(
    archive: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    rewrite(archive, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(archive)
    assert not list(expanded_folder().glob("*"))


def test_a_small_file_cannot_claim_to_be_a_large_one(archive: Path) -> None:
    def claim(document: dict[str, Any]) -> None:
        for tensor in tensors_of(document):
            pieces = -(-(2**34) // archive_reader.PIECE_BYTES)
            for plane in tensor["planes"]:
                plane.update(lengths=[sum(plane["lengths"])] + [0] * (pieces - 1), counts=[1] + [0] * 255)
                plane.update(width=8)
            tensor.update(bytes=2**34)

    rewrite(archive, claim)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=r"claims to stand for \d+; the limit is 256 times as many"):
        open_checkpoint(archive)
    assert time.process_time() - start < 1


def test_other_folders_with_such_a_file_and_other_versions_are_named(archive: Path) -> None:
    path = archive / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match="is not that of an archive"):
        open_checkpoint(archive)
    config["quantization_config"]["version"] = 9
    path.write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="an archive of version 9, supported is 1"):
        open_checkpoint(archive)


@given(data=st.data())
@settings(deadline=3000, max_examples=60)
def test_damage_never_raises_anything_but_our_errors(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.getbasetemp()
    folder, output = base / "small", base / "small_archive"
    if not output.exists():
        folder.mkdir()
        weight = random_grouped(30, 64, bits=4, group_size=32, share_of_zeros=0.5)
        values = to_f32(weight)
        save_file({"a.weight": values}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        write_archive(folder, output)
        (base / "whole").write_bytes((output / ARCHIVE_FILE).read_bytes())
    content = bytearray((base / "whole").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(st.binary(min_size=1, max_size=3))
        content[at : at + len(piece)] = piece
    end = data.draw(st.sampled_from([len(content)] * 3 + [len(content) // 2]))
    (output / ARCHIVE_FILE).write_bytes(bytes(content[:end]))
    start = time.process_time()
    with suppress(FastServeError):
        path = open_checkpoint(output).path
        assert (path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert time.process_time() - start < 1


def test_planes_without_counts_are_bytes_as_they_are() -> None:
    data = np.arange(256, dtype=np.uint8)
    coder = Coder(Plane(8, ()))
    assert coder.encode(data) is data
    with pytest.raises(ValueError, match="255 bytes are kept of 256"):
        coder.decode(data[:-1], 256)
