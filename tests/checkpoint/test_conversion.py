"""What is written is read by the libraries of its formats: dequantized weights have the same bits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from gguf import GGMLQuantizationType, GGUFReader, dequantize, quants
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from fastserve.checkpoint import Checkpoint, StoredTensor, TensorFormat, open_checkpoint
from fastserve.checkpoint.conversion import ConvertedWeights, Target
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.convert_checkpoint import convert
from fastserve.checkpoint.gguf_modules import find_place
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.checkpoint.tokenizer import Tokenizer as OurTokenizer
from fastserve.errors import OptionError, UnsupportedError
from fastserve.evaluate.random_model import SHAPES, make_byte_tokenizer, write_random_model
from fastserve.models.family import read_config
from fastserve.models.matrices import find_matrices

TINY = {**SHAPES["smollm2-135m"], "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"head_dim": 32, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 320}
TINY |= {"max_position_embeddings": 256}

Write = Callable[[Path, Target, ConvertedWeights], Path]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Llama of random numbers in bfloat16."""
    write_random_model(TINY, tmp_path / "source")
    return tmp_path / "source"


def write(source: Path, target: Target, weights: ConvertedWeights = "auto") -> tuple[Checkpoint, list[str]]:
    """The model as it is written, and the lines about it."""
    checkpoint = open_checkpoint(source)
    matrices = find_matrices(checkpoint)
    output = source.parent / f"{source.name}-{target}-{weights.replace(':', '-')}"
    lines = convert(checkpoint, target, weights, output, matrices).lines
    return open_checkpoint(output), lines


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def same_bits(ours: Mapping[str, StoredTensor], theirs: Mapping[str, StoredTensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        np.array_equal(to_f32(ours[name]), to_f32(theirs[name])) for name in ours
    )


def assert_transformers_has_the_same(checkpoint: Checkpoint) -> None:
    """The weights that transformers makes of a folder, decompressed by compressed-tensors."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path)
    with torch.no_grad():
        assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()  # which decompresses
    state = model.state_dict()
    for name, tensor in checkpoint.tensors.items():
        values = torch.from_numpy(to_f32(tensor))
        if tensor.format is TensorFormat.F32:  # as transformers loads what is stored finer than the model is
            values = values.to(state[name].dtype).float()
        assert torch.equal(state[name].float(), values), name


def assert_library_has_the_same(checkpoint: Checkpoint) -> dict[str, str]:
    """The tensors that the gguf library dequantizes; returns their types by Hugging Face name."""
    library = {tensor.name: tensor for tensor in GGUFReader(checkpoint.path).tensors}
    found = {}
    for name, tensor in checkpoint.tensors.items():
        place = find_place({"model_type": "llama"}, name)
        assert place is not None
        theirs = library.pop(place.name)
        values = dequantize(theirs.data, theirs.tensor_type).reshape(tensor.shape)
        expected = to_f32(tensor)
        if (heads := {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])) is not None:
            halves = expected.reshape(heads, 2, len(expected) // heads // 2, -1)
            expected = halves.swapaxes(1, 2).reshape(expected.shape)
        assert np.array_equal(values, expected), name
        found[name] = theirs.tensor_type.name
    assert not library
    return found


@pytest.mark.parametrize("weights", ["auto", "int8", "int8:g32", "w8a8", "int4", "int4:g32", "int4:g128"])
def test_compressed_tensors_are_read_by_transformers(source: Path, weights: ConvertedWeights) -> None:
    written, lines = write(source, "compressed-tensors", weights)
    form = "int8" if weights == "auto" else weights
    assert f"14 tensors rounded to {form} from bf16" in lines
    linears = [tensor for name, tensor in written.tensors.items() if is_linear(name)]
    assert all(isinstance(t, GroupedTensor) and t.bits == (4 if "int4" in weights else 8) for t in linears)
    original = open_checkpoint(source).tensors
    for name, tensor in written.tensors.items():
        values, expected = to_f32(tensor), to_f32(original[name])
        steps = 7 if "int4" in weights else 127
        # Half a step, and what rounding the scale and the product to bfloat16 adds.
        tolerance = 0.85 * np.abs(expected).max() / steps if is_linear(name) else 0
        assert np.abs(values - expected).max() <= tolerance
    assert_transformers_has_the_same(written)


def test_matrices_whose_inputs_stay_as_they_are_stand_beside_w8a8(source: Path) -> None:
    checkpoint = open_checkpoint(source)
    alone = frozenset(name for name in checkpoint.tensors if "down_proj" in name)
    matrices = replace(find_matrices(checkpoint), float_activations=alone)
    convert(checkpoint, "compressed-tensors", "w8a8", source.parent / "output", matrices)
    written = open_checkpoint(source.parent / "output")
    quantization = written.config["quantization_config"]
    assert quantization["format"] == "mixed-precision"
    groups = {group["format"]: group for group in quantization["config_groups"].values()}
    assert set(groups) == {"int-quantized", "pack-quantized"}
    assert set(groups["pack-quantized"]["targets"]) == {name.removesuffix(".weight") for name in alone}
    assert "input_activations" not in groups["pack-quantized"]
    assert groups["int-quantized"]["input_activations"]["strategy"] == "token"
    QuantizationConfig.model_validate(quantization)
    assert_transformers_has_the_same(written)
    assert all(
        isinstance(tensor, GroupedTensor) for name, tensor in written.tensors.items() if is_linear(name)
    )


@pytest.mark.parametrize("weights", ["auto", "f32", "f16", "bf16"])
def test_plain_numbers_are_read_by_transformers(source: Path, weights: ConvertedWeights) -> None:
    written, _ = write(source, "safetensors", weights)
    assert_transformers_has_the_same(written)
    if weights != "f16":
        assert same_bits(written.tensors, open_checkpoint(source).tensors)


@pytest.mark.parametrize(
    ("weights", "kinds"),
    [
        ("auto", ("BF16", "BF16")),
        ("f32", ("F32", "F32")),
        ("f16", ("F16", "F16")),
        ("int8", ("Q8_0", "Q8_0")),
        ("int4", ("Q4_0", "Q8_0")),
    ],
)  # fmt: skip
def test_gguf_is_read_by_its_library(source: Path, weights: ConvertedWeights, kinds: tuple[str, str]) -> None:
    written, _ = write(source, "gguf", weights)
    found = assert_library_has_the_same(written)
    assert {kind for name, kind in found.items() if is_linear(name)} == {kinds[0]}
    assert found["model.embed_tokens.weight"] == kinds[1]
    assert found["model.norm.weight"] == "F32"
    if weights in ("auto", "f32"):
        assert same_bits(written.tensors, open_checkpoint(source).tensors)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_values_are_rounded_to_blocks_as_by_the_gguf_library(source: Path, kind: str) -> None:
    written, _ = write(source, "gguf", "int8" if kind == "Q8_0" else "int4")
    original = open_checkpoint(source).tensors
    for name in filter(is_linear, original):
        type_ = GGMLQuantizationType[kind]
        expected = quants.dequantize(quants.quantize(to_f32(original[name]), type_), type_)
        assert np.array_equal(to_f32(written.tensors[name]), expected)


@pytest.mark.parametrize("weights", ["int8", "int8:g32", "w8a8", "int4", "int4:g32"])
def test_whole_numbers_go_to_gguf_and_back_exactly(source: Path, weights: ConvertedWeights) -> None:
    compressed, _ = write(source, "compressed-tensors", weights)
    written, lines = write(compressed.path, "gguf")
    kind = "q4_0" if "int4" in weights else "q8_0"
    assert any(line.startswith(f"14 tensors kept exactly as {kind}: from int") for line in lines)
    assert_library_has_the_same(written)
    back, lines = write(written.path, "compressed-tensors")
    assert any(line.startswith("14 tensors kept exactly as int") for line in lines)
    for name in filter(is_linear, written.tensors):
        a, b, c = (t.tensors[name] for t in (compressed, written, back))
        assert isinstance(a, GroupedTensor)
        assert isinstance(c, GroupedTensor)
        assert np.array_equal(a.groups(0, len(to_f32(a))).codes, c.groups(0, len(to_f32(c))).codes)
        exact = a.groups(0, a.shape[0])
        of_column = np.arange(a.shape[1]) // a.group_size
        assert np.array_equal(exact.codes * exact.scales[:, of_column], to_f32(b))
    assert_transformers_has_the_same(back)


def quantize_as(folder: Path, method: str) -> Path:
    """The model with linears as GPTQ or AWQ has them, with zero points."""
    source = open_checkpoint(folder)
    random = torch.Generator().manual_seed(7)

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=random).to(torch.int32)

    parts: dict[str, torch.Tensor] = {}
    for name, tensor in source.tensors.items():
        if not is_linear(name):
            parts[name] = torch.from_numpy(to_f32(tensor)).half()
            continue
        module, (rows, depth) = name.removesuffix(".weight"), tensor.shape
        packed = words(depth // 8, rows) if method == "gptq" else words(depth, rows // 8)
        parts |= {f"{module}.qweight": packed, f"{module}.qzeros": words(depth // 64, rows // 8)}
        parts[f"{module}.scales"] = torch.rand((depth // 64, rows), generator=random).half() / 100
    output = folder.parent / method
    output.mkdir()
    save_file(parts, output / "model.safetensors")
    (output / "config.json").write_text(json.dumps({**TINY, "quantization_config": {"quant_method": method}}))
    (output / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    return output


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_gptq_and_awq_are_written_exactly(source: Path, method: str) -> None:
    quantized = quantize_as(source, method)
    original = open_checkpoint(quantized).tensors
    compressed, lines = write(quantized, "compressed-tensors")
    assert "14 tensors kept exactly as int5 in groups of 64: zero points are taken off" in lines
    assert same_bits(compressed.tensors, original)
    assert_transformers_has_the_same(compressed)
    plain, lines = write(quantized, "safetensors")
    assert "14 tensors dequantized from int4 in groups of 64 to f16: as its own library does" in lines
    assert same_bits(plain.tensors, original)
    blocks, lines = write(quantized, "gguf")
    assert "14 tensors kept exactly as q5_0: from int4 in groups of 64" in lines
    assert_library_has_the_same(blocks)
    for name in original:  # products of float16 scales: rounded by the library of the one, not of the other
        np.testing.assert_allclose(to_f32(blocks.tensors[name]), to_f32(original[name]), rtol=1e-3)


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("Q4_0", "14 tensors kept exactly as int4 in groups of 32: those of q4_0"),
        ("Q5_0", "14 tensors kept exactly as int5 in groups of 32: those of q5_0"),
        ("Q4_1", "14 tensors rounded to int8:g32 from q4_1: which compressed-tensors cannot hold"),
    ],
)
def test_what_a_format_cannot_hold_is_rounded_and_told(
    write_tiny_llama: Callable[..., Path], kind: str, line: str
) -> None:
    path = write_tiny_llama(kind=GGMLQuantizationType[kind], metadata=BYTE_TOKENIZER)
    written, lines = write(path, "compressed-tensors")
    assert line in lines
    assert_transformers_has_the_same(written)
    original = open_checkpoint(path).tensors
    for name in filter(is_linear, original):
        exact, tensor = to_f32(original[name]), written.tensors[name]
        limit = np.abs(exact).max() * (2**-11 if "kept" in line else 0.85 / 127)
        assert np.abs(to_f32(tensor) - exact).max() <= limit


BYTES = make_byte_tokenizer(320)["model"]["vocab"]
BYTE_TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": list(BYTES)[:40],
}


def test_a_tokenizer_goes_to_gguf_and_back(source: Path) -> None:
    text = "Hello, world! It's 42°, naïve 東京\n\n  end"
    expected = Tokenizer.from_file(str(source / "tokenizer.json")).encode(text).ids
    written, _ = write(source, "gguf")
    assert OurTokenizer.from_checkpoint(written).encode(text) == expected
    back, _ = write(written.path, "safetensors")
    assert OurTokenizer.from_checkpoint(back).encode(text) == expected


def test_the_tokenizer_of_a_trained_llama_goes_to_gguf(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "model_stories260K"
    link = tmp_path / "stories"
    link.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".gguf":
            (link / path.name).symlink_to(path)
    written, _ = write(link, "gguf")
    text = 'Once upon a time, there was a girl named Lily. She said: "Wow!"\nÉ 東'
    theirs = OurTokenizer.from_checkpoint(open_checkpoint(folder / "stories260K.gguf"))
    assert OurTokenizer.from_checkpoint(written).encode(text) == theirs.encode(text)
    assert same_bits(written.tensors, open_checkpoint(link).tensors)
    assert written.eos_token_ids == open_checkpoint(link).eos_token_ids
    same = ("hidden_size", "num_key_value_heads", "rope_theta", "rms_norm_eps", "max_position_embeddings")
    config = open_checkpoint(link).config
    assert {key: written.config[key] for key in same if key in config} == {
        key: config[key] for key in same if key in config
    }


def test_an_encoder_goes_to_gguf(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model_dir("all-minilm-l6-v2"))
    lines = convert(checkpoint, "gguf", "auto", tmp_path / "m", find_matrices(checkpoint)).lines
    assert "2 tensors left out: GGUF has no place for pooler.dense" in lines
    written = open_checkpoint(tmp_path / "m")
    for name, tensor in written.tensors.items():
        assert np.array_equal(to_f32(tensor), to_f32(checkpoint.tensors[name])), name
    text = "A naïve test: 3.14, don't!"
    ids = [OurTokenizer.from_checkpoint(c).encode(text) for c in (written, checkpoint)]
    assert ids[0] == ids[1]
    assert written.sentence is not None
    assert written.sentence.pooling == {"pooling_mode": "mean"}


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_qwen_goes_to_gguf_and_back(tmp_path: Path, model_type: str) -> None:
    """Biases without a word, norms of heads, and rows in the order of halves."""
    from transformers import AutoConfig

    shape = {**TINY, "architectures": None, "model_type": model_type, "tie_word_embeddings": False}
    del shape["attention_bias"], shape["mlp_bias"], shape["rope_theta"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).bfloat16()
    model.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text(json.dumps(make_byte_tokenizer(320)))
    written, _ = write(tmp_path / "source", "gguf")
    source = open_checkpoint(tmp_path / "source")
    assert same_bits(written.tensors, source.tensors)
    assert read_config(written.config) == read_config(source.config)
    library = {tensor.name for tensor in GGUFReader(written.path).tensors}
    assert ("blk.0.attn_q.bias" in library) == (model_type == "qwen2")
    assert ("blk.1.attn_k_norm.weight" in library) == (model_type == "qwen3")
    compressed, _ = write(written.path, "compressed-tensors", "int8")
    assert_transformers_has_the_same(compressed)


def test_matrices_that_are_stored_the_other_way_round_are_not_compressed(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=320, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text(json.dumps(make_byte_tokenizer(320)))
    with pytest.raises(UnsupportedError, match="has no matrices that can be compressed"):
        write(tmp_path / "source", "compressed-tensors")


def test_rope_scaling_of_llama_3_goes_to_gguf_and_back(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    write_random_model({**TINY, "rope_parameters": rope}, tmp_path / "source")
    written, _ = write(tmp_path / "source", "gguf")
    assert written.config["rope_parameters"] == rope


def test_nothing_is_left_where_writing_fails(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(source)

    def fail(*_: object) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr("fastserve.checkpoint.to_safetensors.write_safetensors", fail)
    before = sorted(path.name for path in source.parent.iterdir())
    with pytest.raises(OSError, match="no space"):
        convert(checkpoint, "safetensors", "auto", source.parent / "output", find_matrices(checkpoint))
    assert sorted(path.name for path in source.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("target", "weights", "message"),
    [
        ("safetensors", "int8", "safetensors hold plain numbers, not weights='int8'"),
        ("compressed-tensors", "bf16", "compressed-tensors hold whole numbers, not weights='bf16'"),
        ("gguf", "int4:g128", "blocks of GGUF have 32 columns"),
    ],
)  # fmt: skip
def test_weights_that_a_format_does_not_have_are_refused(
    source: Path, target: Target, weights: ConvertedWeights, message: str
) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        write(source, target, weights)


def test_a_folder_that_holds_something_is_left_alone(source: Path) -> None:
    checkpoint = open_checkpoint(source)
    with pytest.raises(OptionError, match="is not an empty folder"):
        convert(checkpoint, "safetensors", "auto", source, find_matrices(checkpoint))


def test_a_tokenizer_that_gguf_cannot_say_is_refused(source: Path) -> None:
    path = source / "tokenizer.json"
    document = json.loads(path.read_text())
    document["pre_tokenizer"] = {"type": "Whitespace"}
    path.write_text(json.dumps(document))
    with pytest.raises(UnsupportedError, match="tokenizer whose words are cut in another way"):
        write(source, "gguf")


def test_activations_that_met_int8_still_do(source: Path) -> None:
    """int-quantized stays so, and packed int8 stays packed."""
    for weights, form in (("w8a8", "int-quantized"), ("int8", "pack-quantized")):
        first, _ = write(source, "compressed-tensors", weights)
        again, lines = write(first.path, "compressed-tensors")
        assert again.config["quantization_config"] == first.config["quantization_config"]
        assert again.config["quantization_config"]["format"] == form
        assert same_bits(again.tensors, first.tensors)
        assert any(line.startswith("14 tensors kept exactly as int8") for line in lines)


def test_formats_of_blocks_are_written_as_bf16_where_numbers_are_plain(
    write_tiny_llama: Callable[..., Path],
) -> None:
    path = write_tiny_llama(kind=GGMLQuantizationType.Q8_0, metadata=BYTE_TOKENIZER)
    written, lines = write(path, "safetensors")
    assert "15 tensors rounded to bf16 from q8_0" in lines
    assert written.tensors["model.embed_tokens.weight"].format is TensorFormat.BF16
    exact, _ = write(path, "safetensors", "f32")
    assert same_bits(exact.tensors, open_checkpoint(path).tensors)
