"""The table of docs/models.md: which families open from which formats, and compute what `transformers` does.

`python tests/models/family_table.py [MODEL_TYPE ...]` writes it, or the rows of those families;
`test_family_table.py` fails where it is stale.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(CHECKOUT / "tests"), str(CHECKOUT / "tests" / "models")]

from gguf import GGMLQuantizationType  # noqa: E402
from test_gguf_families import FAMILIES as GGUF_FAMILIES  # noqa: E402
from test_gguf_families import write_gguf  # noqa: E402

from decoder_configs import DECODERS, LLAMA  # noqa: E402
from encoder_decoder_configs import ENCODER_DECODERS  # noqa: E402
from fastserve.checkpoint.checkpoint import open_checkpoint  # noqa: E402
from fastserve.checkpoint.convert_checkpoint import convert  # noqa: E402
from fastserve.errors import UnsupportedError  # noqa: E402
from fastserve.graph.node import Linear, MixtureOfExperts  # noqa: E402
from fastserve.models.family import (  # noqa: E402
    DECODER_FAMILIES,
    ENCODER_DECODER_FAMILIES,
    ENCODER_FAMILIES,
    build_graph,
    build_source_encoder,
    read_config,
)
from fastserve.models.matrices import find_matrices  # noqa: E402
from fastserve.types import Float32Array  # noqa: E402
from parity import (  # noqa: E402
    RANGE_BOUND,
    compile_graph,
    load_model,
    range_error,
    run_embeddings,
    run_logits,
)
from source_parity import compile_graphs, load_graphs, run_target  # noqa: E402
from tiny_encoders import ENCODERS, hf_encoder, hf_vectors  # noqa: E402
from tiny_models import random_encoder_decoder, random_language_model  # noqa: E402

DOCUMENT = CHECKOUT / "docs" / "models.md"
SCRIPT = "tests/models/family_table.py"
YES, NO = "yes", "–"

TEXT: list[int] = np.random.default_rng(3).integers(5, 300, 40).tolist()

# Widths that are whole blocks of 32, so that every format could hold the matrices.
_WIDTHS = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "dim": 64,
    "hidden_dim": 128,
    "embedding_size": 32,
    "n_embd": 64,
    "ffn_dim": 128,
    "word_embed_proj_dim": 64,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}


def widened(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**config, **{key: _WIDTHS[key] for key in _WIDTHS.keys() & config.keys()}}


CONFIGS: dict[str, dict[str, Any]] = {
    config["model_type"]: widened(config)
    for name, config in {"llama": LLAMA, **DECODERS, **ENCODERS, **ENCODER_DECODERS}.items()
    if "," not in name
}
# Of families of which GGUF can say some models only: those.
SAID_IN_GGUF: dict[str, dict[str, Any]] = {
    **{config["model_type"]: widened(config) for _, config in reversed(GGUF_FAMILIES.values())},
    "t5": {**CONFIGS["t5"], "relative_attention_max_distance": 128},
}
# The same text models inside another config.
TEXT_PARTS = {"gemma3": "gemma3_text"}


def save(model_type: str, folder: Path, config: Mapping[str, Any] | None = None) -> Float32Array:
    """Save a random model of a family and a tokenizer; give what it computes of TEXT (of encoder-decoders:
    after TEXT): logits, or the mean of its vectors."""
    import torch

    config = dict(CONFIGS[model_type] if config is None else config)
    if model_type in ENCODER_FAMILIES:
        model = hf_encoder(config)
        expected = hf_vectors(model, TEXT).mean(0, keepdims=True)
    elif model_type in ENCODER_DECODER_FAMILIES:
        model = random_encoder_decoder(config)
        with torch.no_grad():
            ids = torch.tensor([TEXT])
            expected = np.asarray(model(ids, decoder_input_ids=ids).logits[0].numpy())
    else:
        model = random_language_model(config)
        with torch.no_grad():
            expected = np.asarray(model(torch.tensor([TEXT])).logits[0].numpy())
    model.save_pretrained(folder)
    save_tokenizer(folder, is_encoder=model_type in ENCODER_FAMILIES)
    return expected


def save_tokenizer(folder: Path, *, is_encoder: bool) -> None:
    """Every byte a token, or, of encoders, every letter a word piece."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    if is_encoder:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        pieces = [*special, *(mark + chr(code) for mark in ("", "##") for code in range(33, 127))]
        tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        tokenizer.post_processor = processors.TemplateProcessing(
            "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", [("[CLS]", 2), ("[SEP]", 3)]
        )
        tokenizer.add_special_tokens(special)
        roles = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<|endoftext|>"])
        roles = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))


def converted(target: Any, weights: Any) -> Callable[[Path, Path], Path]:
    def write(folder: Path, output: Path) -> Path:
        checkpoint = open_checkpoint(folder)
        convert(checkpoint, target, weights, output, find_matrices(checkpoint))
        return output

    return write


def linears_of(folder: Path) -> list[str]:
    """What GPTQ and AWQ pack: all linears but the head, those of experts too, in whatever order rows lie."""
    checkpoint = open_checkpoint(folder)
    config = read_config(checkpoint.config)
    graph = build_graph(config, checkpoint.tensors.keys())
    if encoder := build_source_encoder(config, checkpoint.tensors.keys()):
        graph = graph.beside(encoder)
    tables = find_matrices(checkpoint).tables
    # A gate of one row a token is no matrix to pack.
    weights = [n.weight for n in graph.nodes if isinstance(n, Linear) and n.out.width % 32 == 0]
    for node in graph.nodes:
        if isinstance(node, MixtureOfExperts):
            weights += [*node.gates, *node.ups, *node.downs]
    return sorted({name for weight in weights for name in weight.names} - set(tables))


def packed(method: str) -> Callable[[Path, Path], Path]:
    """Linears as the libraries of GPTQ and AWQ pack them: 4 bits, groups of 32."""

    def write(folder: Path, output: Path) -> Path:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        is_transposed = json.loads((folder / "config.json").read_text())["model_type"] == "gpt2"
        names = linears_of(folder)
        assert names
        for name in names:
            weight, module = tensors.pop(name).numpy(), name.removesuffix(".weight")
            weight = weight.T if is_transposed else weight
            tensors |= {f"{module}.{part}": tensor for part, tensor in pack(weight, method).items()}
        output.mkdir()
        save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32}
        (output / "config.json").write_text(json.dumps(config))
        return output

    return write


def pack(weight: Float32Array, method: str) -> dict[str, Any]:
    """`qweight`, `qzeros` and `scales` of weight [out, in]: by columns of it for GPTQ (gptqmodel,
    nn_modules/qlinear), by rows in an order of their own for AWQ (awq/modules/linear/gemm.py)."""
    import torch

    depth, width = weight.T.shape
    groups = weight.T.reshape(depth // 32, 32, width)
    scales = (np.abs(groups).max(1) / 7.5).astype(np.float16)
    zero = 8
    numbers = np.clip(np.rint(groups / scales[:, None].astype(np.float32)) + zero, 0, 15)
    numbers = numbers.astype(np.uint32).reshape(depth, width)
    zeros = np.full((depth // 32, width), zero, np.uint32)
    order = [0, 2, 4, 6, 1, 3, 5, 7] if method == "awq" else range(8)

    def to_words(eights: Any) -> Any:  # [..., 8] -> [...]
        words = sum(eights[..., neighbour] << np.uint32(4 * i) for i, neighbour in enumerate(order))
        return torch.from_numpy(np.ascontiguousarray(words).view(np.int32))

    by_row = numbers.reshape(depth, width // 8, 8)
    by_column = numbers.reshape(depth // 8, 8, width).swapaxes(1, 2)
    stored_zeros = zeros if method == "awq" else zeros - 1
    return {
        "qweight": to_words(by_row if method == "awq" else by_column),
        "qzeros": to_words(stored_zeros.reshape(len(zeros), width // 8, 8)),
        "scales": torch.from_numpy(scales.copy()),
    }


# Title -> how a saved folder becomes one of that format, and the least correlation of what it computes with
# what was saved. Of random weights, 8 bits leave 0.998 and more, 4 bits 0.78 to 0.97.
FORMATS: Mapping[str, tuple[Callable[[Path, Path], Path], float]] = {
    "GGUF written": (converted("gguf", "int8"), 0.99),
    "compressed-tensors int8": (converted("compressed-tensors", "int8"), 0.99),
    "compressed-tensors int4": (converted("compressed-tensors", "int4:g32"), 0.5),
    "GPTQ": (packed("gptq"), 0.5),
    "AWQ": (packed("awq"), 0.5),
}


def compute(folder: Path, backend: str) -> Float32Array:
    """What we compute of TEXT, in float32."""
    if open_checkpoint(folder).config.get("is_encoder_decoder"):
        return run_target(compile_graphs(backend, load_graphs(folder)), TEXT, TEXT)
    graph, parameters = load_model(folder)
    executable = compile_graph(backend, graph, parameters, max_context=64)
    if "embedding" in graph.outputs:
        return run_embeddings(executable, [TEXT])
    return run_logits(executable, TEXT)


def opens(folder: Path, expected: Float32Array, backend: str, least_correlation: float) -> bool:
    """Whether a model opens; False where it is refused by name.

    Raises:
        AssertionError: it opens and computes something else.
    """
    try:
        actual = compute(folder, backend)
    except UnsupportedError:
        return False
    if least_correlation == 1.0:
        assert range_error(actual, expected) < RANGE_BOUND
    else:
        correlation = np.corrcoef(actual.ravel(), expected.ravel())[0, 1]
        assert correlation > least_correlation, f"{folder} correlates by {correlation:.4f}"
    return True


def opens_gguf(model_type: str, folder: Path) -> bool:
    """Whether a decoder opens from what llama.cpp's converter writes in Q8_0 of what GGUF can say."""
    import torch

    found = [entry for entry in GGUF_FAMILIES.values() if entry[1]["model_type"] == model_type]
    if not found:
        return False
    architecture, config = found[0]
    model = random_language_model(widened(config))
    with torch.no_grad():
        expected = np.asarray(model(torch.tensor([TEXT])).logits[0].numpy())
    write_gguf(folder / "model.gguf", architecture, model, GGMLQuantizationType.Q8_0)
    return opens(folder / "model.gguf", expected, "torch", 0.99)


def cells(model_type: str, folder: Path) -> list[str]:
    """A family's row of the table but for its names. `folder` is empty; the model is saved in it."""
    saved = folder / "saved"
    expected = save(model_type, saved)
    found = [opens(saved, expected, backend, 1.0) for backend in ("native", "torch")]
    found.append(opens_gguf(model_type, folder))
    for name, (write, least_correlation) in FORMATS.items():
        if name == "GGUF written" and model_type in SAID_IN_GGUF:
            model = folder / "said-in-gguf"
            computed = save(model_type, model, SAID_IN_GGUF[model_type])
        else:
            model, computed = saved, expected
        try:
            written = write(model, folder / name.replace(" ", "-"))
        except UnsupportedError:
            found.append(False)
            continue
        found.append(opens(written, computed, "torch", least_correlation))
    found[2] |= found[3]  # what we write as GGUF has been opened
    return [YES if cell else NO for cell in found]


def row(model_type: str, folder: Path) -> str:
    families = {**DECODER_FAMILIES, **ENCODER_FAMILIES, **ENCODER_DECODER_FAMILIES}
    also = [other for other, own in TEXT_PARTS.items() if own == model_type]
    names = ", ".join(f"`{name}`" for name in (model_type, *also))
    return f"| {' | '.join([families[model_type].title, names, *cells(model_type, folder)])} |"


HEADER = ("family", "`model_type`", "native", "torch", "GGUF", *FORMATS)


def main() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    rows = ["| " + " | ".join(HEADER) + " |", "| " + " | ".join("---" for _ in HEADER) + " |"]
    for model_type in CONFIGS:
        kept = [line for line in text.splitlines() if f"| `{model_type}`" in line]
        if sys.argv[1:] and model_type not in sys.argv[1:] and kept:
            rows += kept
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(model_type, Path(folder)))
            print(rows[-1], flush=True)
    table = "\n".join(rows)
    pattern = r"(<!-- table families -->\n).*?(<!-- end of table -->)"
    updated = re.sub(pattern, lambda match: f"{match[1]}{table}\n{match[2]}", text, flags=re.DOTALL)
    DOCUMENT.write_text(updated, encoding="utf-8")


if __name__ == "__main__":
    main()
