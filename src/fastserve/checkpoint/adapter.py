"""Reads adapters in the layout of peft (adapter_config.json, adapter_model.safetensors), LoRA and DoRA, and
adds them to a model's own weights.

Sources: Hu et al. 2021, arXiv 2106.09685, section 4.1 (W + alpha / r * B A); Kalajdzievski 2023, arXiv
2312.03732 (alpha / sqrt(r)); Liu et al. 2024, arXiv 2402.09353, section 4 (DoRA); the files as
peft.tuners.lora writes them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.file import read_json
from fastserve.checkpoint.safetensors import only_tensors, read_safetensors
from fastserve.checkpoint.tensor import ComputedTensor, StoredTensor, TensorFormat
from fastserve.errors import CheckpointError, ModelNotFoundError, UnsupportedError
from fastserve.types import Float32Array, JsonObject

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_PREFIX = "base_model.model."
_MAX_NAMED = 5  # problems in one message
_TENSOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)(\.default)?(\.weight)?"
)

# What says how an adapter was trained or where it belongs; nothing of it changes what is computed.
_IGNORED = frozenset(
    (
        "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
        "inference_mode", "runtime_config", "megatron_core", "ensure_weight_tying", "target_modules",
        "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "loftq_config",
        "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
    )
)  # fmt: skip
_READ = frozenset(
    (
        "r", "lora_alpha", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_rslora", "use_dora",
        "bias", "modules_to_save", "init_lora_weights",
    )
)  # fmt: skip
_INITS_THAT_KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "loftq")


@dataclass(frozen=True, slots=True)
class LowRank:
    """What is added to a matrix W [rows, columns]: scale * B A; `magnitudes` [rows] are then the lengths of
    its rows (DoRA).

    `a` is [rank, columns] and `b` [rows, rank], float32. W is stored as [columns, rows] if `is_transposed`.
    """

    a: Float32Array
    b: Float32Array
    scale: float
    is_transposed: bool = False
    magnitudes: Float32Array | None = None
    is_embedding: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of the stored matrix."""
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.is_transposed else shape

    @property
    def is_finite(self) -> bool:
        arrays = (self.a, self.b, self.magnitudes)
        return all(array is None or bool(np.isfinite(array).all()) for array in arrays)

    def added_to(self, stored: StoredTensor, begin: int, end: int) -> NDArray[np.uint8]:
        """Rows of the stored matrix with the adapter in them, as bytes of float32."""
        rows = to_f32(stored.rows(begin, end))
        if self.is_transposed:
            rows += np.float32(self.scale) * (self.b @ self.a[:, begin:end]).T
        else:
            rows += np.float32(self.scale) * (self.b[begin:end] @ self.a)
        if self.magnitudes is not None:
            lengths = np.linalg.norm(rows, axis=1)
            rows *= (self.magnitudes[begin:end] / np.where(lengths == 0, 1, lengths))[:, None]
        return np.ascontiguousarray(rows).view(np.uint8).reshape(-1)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on disk.

    Attributes:
        base: the model that it says it was trained on.
        matrices: by the name of the module in that model.
        saved: tensors that it has in place of the model's (`modules_to_save`), by their names.
    """

    path: Path
    base: str | None
    matrices: Mapping[str, LowRank]
    saved: Mapping[str, StoredTensor]

    @property
    def max_rank(self) -> int:
        """The highest of its matrices, and of what it takes to replace a matrix."""
        ranks = [len(matrix.a) for matrix in self.matrices.values()]
        replaced = [min(tensor.shape) for tensor in self.saved.values() if len(tensor.shape) == 2]
        return max([*ranks, *replaced], default=1)


def open_adapter(folder: Path) -> Adapter:
    """Read an adapter.

    Raises:
        ModelNotFoundError: there is no such folder.
        CheckpointError: files are missing or inconsistent.
        UnsupportedError: another kind of adapter, or a setting that we do not compute.
    """
    if not folder.is_dir():
        raise ModelNotFoundError(
            f"{folder} is no folder", hint="name the folder of adapter_config.json and its weights"
        )
    config = read_json(folder / ADAPTER_FILES[0])
    _check_config(config, folder)
    weights = folder / ADAPTER_FILES[1]
    if not weights.is_file() and (folder / "adapter_model.bin").is_file():
        raise UnsupportedError(
            f"{folder} has its weights in a pickle, which can run any code when it is opened: not supported",
            hint="save the adapter again with a newer peft, which writes adapter_model.safetensors",
        )
    base = config.get("base_model_name_or_path")
    matrices, saved = _read_tensors(only_tensors(weights, read_safetensors(weights)), config, folder)
    return Adapter(folder, base if isinstance(base, str) else None, matrices, saved)


def merge_adapter(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The model with the adapter added to its matrices, which become float32 as they are read, and with the
    tensors that the adapter has in place of its own.

    Raises:
        CheckpointError: the adapter changes modules that the model has not, or of another shape, or holds
            numbers that are none; the first are named.
        UnsupportedError: a DoRA adapter of transposed matrices.
    """
    found: dict[str, LowRank | StoredTensor] = {}
    problems = []
    for saved_name, tensor in adapter.saved.items():
        name = near_name(saved_name, checkpoint.tensors)
        if name is None:
            is_head = saved_name in ("lm_head.weight", "embed_out.weight")
            problems.append(f"{saved_name} is not there{' (its head is its embedding)' if is_head else ''}")
        elif checkpoint.tensors[name].shape != tensor.shape:
            shape = list(checkpoint.tensors[name].shape)
            problems.append(f"{saved_name} has shape {shape}, the adapter's {list(tensor.shape)}")
        elif not np.isfinite(to_f32(tensor)).all():
            problems.append(f"{saved_name} has numbers that are not finite")
        else:
            found[name] = replace(tensor, name=name)
    for module, low_rank in adapter.matrices.items():
        if low_rank.magnitudes is not None and low_rank.is_transposed:
            raise UnsupportedError(
                f"{adapter.path} is a DoRA adapter of matrices that are stored transposed: it is not merged",
                hint="load it beside the model, or merge it with peft: model.merge_and_unload()",
            )
        name = tensor_name(module, checkpoint.tensors)
        if name is None:
            problems.append(f"{module} is not there")
        elif checkpoint.tensors[name].shape != low_rank.shape:
            shape = list(checkpoint.tensors[name].shape)
            problems.append(f"{module} has shape {shape}, the adapter's {list(low_rank.shape)}")
        elif not low_rank.is_finite:
            problems.append(f"{module} has numbers that are not finite")
        else:
            found[name] = low_rank
    if problems:
        raise CheckpointError(
            f"{adapter.path} is no adapter of {checkpoint.path}: {name_problems(problems)}",
            hint=f"it was trained on {adapter.base}"
            if adapter.base
            else "choose the model it was trained on",
        )
    return replace(checkpoint, tensors=_Merged(checkpoint.tensors, found))


def name_problems(problems: Sequence[str]) -> str:
    """The first of them, and how many more there are.

    >>> name_problems("abcdefg")
    'a; b; c; d; e; and 2 more'
    """
    more = f"; and {len(problems) - _MAX_NAMED} more" if len(problems) > _MAX_NAMED else ""
    return "; ".join(problems[:_MAX_NAMED]) + more


class _Merged(Mapping[str, StoredTensor]):
    """A model's tensors, some replaced, some with low-rank matrices added when they are read."""

    def __init__(
        self, tensors: Mapping[str, StoredTensor], changed: Mapping[str, LowRank | StoredTensor]
    ) -> None:
        self._tensors = tensors
        self._changed = changed

    def __getitem__(self, name: str) -> StoredTensor:
        stored = self._tensors[name]
        change = self._changed.get(name)
        if change is None or isinstance(change, StoredTensor):
            return change or stored
        low_rank = change

        def read(begin: int, end: int) -> NDArray[np.uint8]:
            return low_rank.added_to(stored, begin, end)

        return ComputedTensor(name, TensorFormat.F32, stored.shape, read)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _check_config(config: JsonObject, folder: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            f"{folder} is an adapter of type {kind!r}, supported is LORA (with or without DoRA)"
        )
    problems = [f"{key}={value!r}" for key, value in config.items() if value and key not in _IGNORED | _READ]
    if config.get("bias", "none") != "none":
        problems.append(f"bias={config['bias']!r}")
    init = config.get("init_lora_weights")
    if init not in _INITS_THAT_KEEP_THE_BASE:
        problems.append(f"init_lora_weights={init!r}, which changes the model itself")
    if problems:
        raise UnsupportedError(
            f"{folder} has settings that are not supported: {', '.join(problems)}",
            hint="merge it with peft: model.merge_and_unload().save_pretrained(folder)",
        )


def _read_tensors(
    tensors: Mapping[str, StoredTensor], config: JsonObject, folder: Path
) -> tuple[dict[str, LowRank], dict[str, StoredTensor]]:
    """The low-rank matrices by module, and what is in place of the model's by tensor."""
    parts: dict[str, dict[str, Float32Array]] = {}
    saved: dict[str, StoredTensor] = {}
    replaced = _replaced_modules(config, folder)
    for full_name in tensors:
        name = full_name.removeprefix(_PREFIX)
        match = _TENSOR.fullmatch(name)
        if match is None and any(f"{module}." in name for module in replaced):
            saved[name] = tensors[full_name]
        elif match is None:
            raise UnsupportedError(
                f"{folder} holds {full_name}, which is no part of a LoRA adapter",
                hint="merge it with peft: model.merge_and_unload().save_pretrained(folder)",
            )
        else:
            parts.setdefault(match["module"], {})[match["part"]] = to_f32(tensors[full_name])
    if not parts and not saved:
        raise CheckpointError(f"{folder} is an adapter without weights")
    return {module: _read_module(module, found, config, folder) for module, found in parts.items()}, saved


def _replaced_modules(config: JsonObject, folder: Path) -> list[str]:
    """What the names of modules end in that the adapter has in place of the model's."""
    names = config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise CheckpointError(f"{folder} has modules_to_save={names!r}, a list of names was expected")
    return names


def _read_module(module: str, parts: Mapping[str, Float32Array], config: JsonObject, folder: Path) -> LowRank:
    is_embedding = "embedding_A" in parts
    a, b = (parts.get(f"embedding_{part}" if is_embedding else part) for part in "AB")
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        shapes = {part: list(values.shape) for part, values in parts.items()}
        raise CheckpointError(f"{folder}: the matrices of {module} do not fit together: {shapes}")
    magnitudes = parts.get("magnitude_vector")
    if magnitudes is not None and is_embedding:
        raise UnsupportedError(
            f"{folder} is a DoRA adapter of the embedding {module}, which is not supported",
            hint="merge it with peft: model.merge_and_unload().save_pretrained(folder)",
        )
    if bool(config.get("use_dora")) != (magnitudes is not None):
        raise CheckpointError(f"{folder}: use_dora and the tensors of {module} contradict each other")
    if magnitudes is not None and magnitudes.size != b.shape[0]:
        raise CheckpointError(f"{folder}: {module} has {magnitudes.size} magnitudes for {b.shape[0]} rows")
    rank = a.shape[0]
    alpha = _alpha(module, config, folder)
    return LowRank(
        a=a,
        b=b,
        scale=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
        is_transposed=is_embedding or bool(config.get("fan_in_fan_out")),
        magnitudes=None if magnitudes is None else magnitudes.reshape(-1),
        is_embedding=is_embedding,
    )


def _alpha(module: str, config: JsonObject, folder: Path) -> float:
    """`lora_alpha`, or that of the first pattern that matches the end of the module's name, as in peft."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{folder} has alpha_pattern={patterns!r:.80}, an object was expected")
    alpha = config.get("lora_alpha")
    for pattern, value in patterns.items():
        if _ends_with(pattern, module, folder):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"{folder} has lora_alpha={alpha!r}, a number was expected")
    return float(alpha)


def _ends_with(pattern: str, module: str, folder: Path) -> bool:
    """Patterns are the names of modules, whole or from a dot on; what peft reads as more is refused."""
    plain = pattern.replace("\\.", ".").removeprefix("^").removesuffix("$")
    if not re.fullmatch(r"[\w.-]+", plain):
        raise UnsupportedError(
            f"{folder} has the alpha_pattern {pattern!r}, supported are names of modules",
            hint="merge it with peft: model.merge_and_unload().save_pretrained(folder)",
        )
    return module == plain or module.endswith(f".{plain}")


def tensor_name(module: str, tensors: Collection[str]) -> str | None:
    """The module's matrix."""
    return near_name(f"{module}.weight", tensors)


def near_name(name: str, tensors: Collection[str]) -> str | None:
    """What a tensor is called: a model may be stored with or without the name of the class around it."""
    if name in tensors:
        return name
    near = [known for known in tensors if known.endswith(f".{name}") or name.endswith(f".{known}")]
    return near[0] if len(near) == 1 else None
