"""ONNX Runtime for encoders: the graph of its own fused operators, quantized by its own tool.

The operators are those that `onnxruntime.transformers.optimizer` makes of an exported BERT
(github.com/microsoft/onnxruntime, docs/ContribOperators.md), the quantization is dynamic, with a scale for
each output channel. Texts of one batch are padded to the longest, as the attention operator wants them.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

_FUSED = "com.microsoft"
_OPSET, _IR_VERSION = 17, 8
_NORMALIZE_EPS = 1e-12  # of torch.nn.functional.normalize
_INT8 = ("int8", "auto")

Array = np.ndarray[Any, Any]


def prepare(job: dict[str, Any], folder: str) -> dict[str, Any]:
    weights = job["weights"].partition(":")[0]
    if weights not in ("f32", *_INT8):
        sys.exit(f"ONNX Runtime is compared with weights f32 and int8, not {job['weights']}")
    model_folder = Path(job["model"])
    target = Path(folder) / "model.onnx"
    config = json.loads((model_folder / "config.json").read_text())
    onnx.save(build_encoder(config, dict(read_safetensors(model_folder)), _normalizes(model_folder)), target)
    if weights != "f32":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantized = Path(folder) / "quantized.onnx"
        known = {"DefaultTensorType": TensorProto.FLOAT}  # of results of fused operators
        quantize_dynamic(
            target, quantized, per_channel=True, weight_type=QuantType.QInt8, extra_options=known
        )
        target = quantized
    return {"model": str(target)}


class Engine:
    def __init__(self, job: dict[str, Any]) -> None:
        self.version = onnxruntime.__version__
        self.weights = "f32" if job["weights"] == "f32" else "int8 per channel, embedding int8"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = job["threads"]
        options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        self._session = onnxruntime.InferenceSession(
            job["model"], options, providers=["CPUExecutionProvider"]
        )

    def embed(self, texts: list[list[int]]) -> list[list[float]]:
        length = max(map(len, texts))
        ids = np.zeros((len(texts), length), np.int32)
        mask = np.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = text
            mask[row, : len(text)] = 1
        feed = {"ids": ids, "types": np.zeros_like(ids), "mask": mask}
        embeddings: list[list[float]] = self._session.run(["embedding"], feed)[0].tolist()
        return embeddings


def build_encoder(config: dict[str, Any], weights: dict[str, Array], normalizes: bool) -> onnx.ModelProto:
    """A BERT with its mean pooling. Inputs int32 [texts, tokens]; output float32 [texts, width]."""
    if config.get("hidden_act", "gelu") != "gelu":
        sys.exit(f"ONNX Runtime's BERT is built here with gelu, not {config['hidden_act']}")
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, onnx.TensorProto] = {}
    prefix = "bert." if "bert.embeddings.word_embeddings.weight" in weights else ""
    eps = config["layer_norm_eps"]

    def constant(name: str, values: Array) -> str:
        constants[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
        return name

    def weight(name: str) -> Array:
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        return weights[prefix + (name if prefix + name in weights else old)]

    def add(op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        return outputs[0]

    def norm(name: str) -> list[str]:
        return [constant(f"{name}.{part}", weight(f"{name}.{part}")) for part in ("weight", "bias")]

    def product(x: str, name: str) -> tuple[str, str]:
        """x @ weight.T, and the bias that whatever follows adds."""
        matrix = constant(f"{name}.weight", weight(f"{name}.weight").T)
        return add("MatMul", [x, matrix], [f"{name}.out"]), constant(f"{name}.bias", weight(f"{name}.bias"))

    tables = [
        constant(f"embeddings.{kind}", weight(f"embeddings.{kind}_embeddings.weight"))
        for kind in ("word", "position", "token_type")
    ]
    x = add(
        "EmbedLayerNormalization",
        ["ids", "types", *tables, *norm("embeddings.LayerNorm"), "mask"],
        ["embedded", "lengths"],
        _FUSED,
        epsilon=eps,
    )
    for layer in range(config["num_hidden_layers"]):
        name = f"encoder.layer.{layer}"
        parts = [f"{name}.attention.self.{part}" for part in ("query", "key", "value")]
        qkv = np.concatenate([weight(f"{part}.weight").T for part in parts], axis=1)
        bias = np.concatenate([weight(f"{part}.bias") for part in parts])
        inputs = [x, constant(f"{name}.qkv", qkv), constant(f"{name}.qkv_bias", bias), "lengths"]
        heads = config["num_attention_heads"]
        attended = add("Attention", inputs, [f"{name}.attended"], _FUSED, num_heads=heads)
        out, bias_name = product(attended, f"{name}.attention.output.dense")
        inputs = [out, x, *norm(f"{name}.attention.output.LayerNorm"), bias_name]
        x = add("SkipLayerNormalization", inputs, [f"{name}.attention_out"], _FUSED, epsilon=eps)
        out, bias_name = product(x, f"{name}.intermediate.dense")
        hidden = add("BiasGelu", [out, bias_name], [f"{name}.hidden"], _FUSED)
        out, bias_name = product(hidden, f"{name}.output.dense")
        inputs = [out, x, *norm(f"{name}.output.LayerNorm"), bias_name]
        x = add("SkipLayerNormalization", inputs, [f"{name}.out"], _FUSED, epsilon=eps)

    add("Cast", ["mask"], ["weights"], to=TensorProto.FLOAT)
    axis = constant("last", np.asarray([2]))
    add("Unsqueeze", ["weights", axis], ["columns"])
    add("Mul", [x, "columns"], ["masked"])
    tokens = constant("tokens", np.asarray([1]))
    add("ReduceSum", ["masked", tokens], ["sum"], keepdims=0)
    add("ReduceSum", ["weights", tokens], ["count"], keepdims=1)
    add("Div", ["sum", "count"], ["mean" if normalizes else "embedding"])
    if normalizes:
        add("ReduceL2", ["mean"], ["length"], axes=[1], keepdims=1)
        add("Max", ["length", constant("eps", np.asarray([_NORMALIZE_EPS], np.float32))], ["divisor"])
        add("Div", ["mean", "divisor"], ["embedding"])

    inputs_info = [
        helper.make_tensor_value_info(name, TensorProto.INT32, ["texts", "tokens"])
        for name in ("ids", "types", "mask")
    ]
    output = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["texts", config["hidden_size"]])
    graph = helper.make_graph(nodes, "encoder", inputs_info, [output], list(constants.values()))
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_FUSED, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)


def read_safetensors(folder: Path) -> Iterator[tuple[str, Array]]:
    """Every float tensor of the folder's files in float32 (github.com/huggingface/safetensors, README)."""
    for path in sorted(folder.glob("*.safetensors")):
        data = np.memmap(path, np.uint8, "r")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        for name, entry in json.loads(data[8:start].tobytes()).items():
            if name == "__metadata__" or entry["dtype"] not in ("F32", "F16", "BF16"):
                continue
            begin, end = (start + offset for offset in entry["data_offsets"])
            assert (end - begin) % math.prod(entry["shape"]) == 0
            yield name, _to_f32(data[begin:end], entry["dtype"]).reshape(entry["shape"])


def _to_f32(data: Array, dtype: str) -> Array:
    copy = np.frombuffer(data.tobytes(), np.uint8)
    if dtype == "BF16":
        return (copy.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return copy.view("<f2" if dtype == "F16" else "<f4").astype(np.float32)


def _normalizes(folder: Path) -> bool:
    """Whether sentence-transformers scales the model's embeddings to length 1; it averages its tokens."""
    modules = folder / "modules.json"
    if not modules.exists():
        return False
    names = [os.path.basename(entry["type"]).rsplit(".", 1)[-1] for entry in json.loads(modules.read_text())]
    return "Normalize" in names
