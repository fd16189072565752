"""What can be chosen about a tuning run: frozen, validated, one name as field, flag and key of a config
file."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from fastserve.errors import OptionError, UnsupportedError
from fastserve.models.prefix import MAX_PREFIX_TOKENS
from fastserve.option import check_choice, check_integer, check_number

Method = Literal["full", "head", "last-layers", "lora", "dora", "ia3", "prefix"]
Optimizer = Literal["adamw", "sgd", "adafactor", "adamw-8bit"]
Schedule = Literal["linear", "cosine", "constant", "polynomial", "inverse-sqrt"]
Precision = Literal["fp32", "bf16", "fp16"]
ClassWeights = Literal["none", "balanced"]
Problem = Literal["auto", "single-label", "multi-label", "regression"]
Device = Literal["auto", "cpu"]

_OF_TEACHERS = (
    "soft_weight",
    "soft_temperature",
    "hidden_weight",
    "attention_weight",
    "layer_map",
    "teacher_processes",
)
INDIFFERENT = ("teacher_processes",)  # what a run's result does not depend on
MIN_MAX_LENGTH = 8  # tokens
ADAPTER_METHODS = ("lora", "dora", "ia3", "prefix")

# What learns well as a start, by method; adapters are small and take larger steps.
_LEARNING_RATES = {"full": 5e-5, "last-layers": 1e-4, "head": 1e-3, "lora": 2e-4, "dora": 2e-4}
_LEARNING_RATES |= {"ia3": 5e-3, "prefix": 1e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """How a model is tuned.

    Attributes:
        epochs: how often all training rows are seen.
        max_steps: end after so many steps of the optimizer, whatever `epochs` says; None is no limit.
        batch_size: rows a step of the optimizer sees, over all processes; must be a multiple of
            `processes` / `tensor_parallel` x `accumulation`.
        accumulation: parts that a batch is computed in, one after the other.
        learning_rate: at its highest; None is what the method usually takes.
        schedule: how it falls after `warmup`, a share of all steps in which it rises.
        weight_decay: of the optimizer, not for norms and biases.
        dropout: in place of the model's own; None leaves that.
        label_smoothing: share of the target that goes to all classes alike.
        class_weights: `balanced` weights a class by rows / (classes x rows of the class).
        max_grad_norm: gradients are scaled down to it; 0 does not.
        precision: what matrices are multiplied in; weights and optimizer stay float32.
        gradient_checkpointing: compute activations again rather than keep them.
        max_length: most tokens of an example; None is what the model takes, up to 512.
        stride: tokens that neighbouring windows of a long text share.
        method: what is learned: all weights, the head alone, the last `last_layers` with the head, an
            adapter, which is merged into the weights at the end, or a prefix: keys and values of every layer,
            which all texts come after, of a decoder.
        rank, alpha, adapter_dropout: of LoRA and DoRA.
        prefix_tokens: keys and values that each layer has of a prefix; positions of texts begin there.
        prefix_projection: a prefix is made by a network of two layers, which learns more steadily and is left
            out of the result (Li and Liang 2021, arXiv 2101.00190, section 4.3).
        metric: chooses the best checkpoint; None is the task's own first, `loss` where rows have no classes.
        patience: evaluations without a better metric after which to stop; None never stops early.
        eval_steps: steps between evaluations on the dev rows; None is an epoch.
        save_steps: steps between checkpoints that `resume` goes on from; None is `eval_steps`.
        seed: of the head's first weights, the order of rows, and dropout.
        problem: of text classification: classes, several at once, or a number; `auto` sees it from labels.
        temperature: of the contrastive loss: similarities are divided by it.
        instruction: what a decoder is told before a source text; None is the task's own.
        processes: on this machine, which share each batch.
        shard: each process keeps a part of the weights, gradients and the optimizer's state (FSDP), instead
            of all of them.
        tensor_parallel: so many processes have the same rows, and a part each of the matrices, which they
            compute together; must divide `processes`, the rest of which share each batch.
        device: where to compute.
        keep_checkpoints: leave the run's folder, with checkpoints and optimizer, when it has ended.
        keep_zeros: what is exactly 0 in the source's matrices stays so: a pruned model stays pruned. Not with
            an adapter, which is added to all of a matrix.
        teacher: a model that has learned the task, from whose outputs this one learns too.
        soft_weight: share of the loss that compares with the teacher's probabilities; the rest is of labels.
        soft_temperature: that both models' logits are divided by where they are compared.
        hidden_weight, attention_weight: of the squared error to the teacher's hidden states, and attention
            maps, which is added to the loss.
        layer_map: for each layer, the one of the teacher, from 0, that it is held to by those two; None
            spreads the teacher's layers evenly, the last to the last.
        teacher_processes: on this machine, which share the examples whose outputs are computed; each has a
            teacher of its own. What is kept is the same, bit for bit on a CPU with as many threads in each.
    """

    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float | None = None
    optimizer: Optimizer = "adamw"
    schedule: Schedule = "linear"
    warmup: float = 0.06
    weight_decay: float = 0.01
    dropout: float | None = None
    label_smoothing: float = 0.0
    class_weights: ClassWeights = "none"
    max_grad_norm: float = 1.0
    precision: Precision = "fp32"
    gradient_checkpointing: bool = False
    max_length: int | None = None
    stride: int = 64
    method: Method = "full"
    last_layers: int = 2
    rank: int = 8
    alpha: float = 16.0
    adapter_dropout: float = 0.05
    prefix_tokens: int = 20
    prefix_projection: bool = False
    metric: str | None = None
    patience: int | None = None
    eval_steps: int | None = None
    save_steps: int | None = None
    seed: int = 0
    problem: Problem = "auto"
    temperature: float = 0.05
    instruction: str | None = None
    processes: int = 1
    shard: bool = False
    tensor_parallel: int = 1
    device: Device = "auto"
    keep_checkpoints: bool = False
    keep_zeros: bool = False
    teacher: str | None = None
    soft_weight: float = 0.5
    soft_temperature: float = 2.0
    hidden_weight: float = 0.0
    attention_weight: float = 0.0
    layer_map: tuple[int, ...] | None = None
    teacher_processes: int = 1

    def __post_init__(self) -> None:
        check_number("epochs", self.epochs, 0.0, 10_000.0, is_low_open=True)
        for name in ("batch_size", "accumulation", "last_layers", "rank"):
            check_integer(name, getattr(self, name), low=1)
        for name in ("processes", "tensor_parallel", "teacher_processes"):
            check_integer(name, getattr(self, name), low=1)
        for name in ("max_steps", "patience", "eval_steps", "save_steps"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), low=1)
        check_integer("prefix_tokens", self.prefix_tokens, low=1, high=MAX_PREFIX_TOKENS)
        if self.max_length is not None:
            check_integer("max_length", self.max_length, low=MIN_MAX_LENGTH)
        check_integer("stride", self.stride, low=0)
        check_integer("seed", self.seed, low=0)
        if self.learning_rate is not None:
            check_number("learning_rate", self.learning_rate, 0.0, 10.0, is_low_open=True)
        for name in ("warmup", "label_smoothing", "adapter_dropout"):
            check_number(name, getattr(self, name), 0.0, 0.99)
        if self.dropout is not None:
            check_number("dropout", self.dropout, 0.0, 0.99)
        for name in ("weight_decay", "max_grad_norm"):
            check_number(name, getattr(self, name), 0.0, 1000.0)
        check_number("alpha", self.alpha, 0.0, 10_000.0, is_low_open=True)
        check_number("temperature", self.temperature, 0.0, 100.0, is_low_open=True)
        for name, kind in _CHOICES.items():
            check_choice(name, getattr(self, name), get_args(kind))
        if self.keep_zeros and self.is_adapter:
            why = "no matrix learns" if self.method == "prefix" else "an adapter is added to all of a matrix"
            raise OptionError(
                f"keep_zeros is not for method={self.method!r}: {why}",
                hint="choose full, last-layers or head",
                option="keep_zeros",
            )
        if self.method == "prefix" and self.gradient_checkpointing:
            raise OptionError(
                "gradient_checkpointing is not for method='prefix': activations would be computed again"
                " without the prefix",
                hint="leave one of the two out",
                option="gradient_checkpointing",
            )
        check_number("soft_weight", self.soft_weight, 0.0, 1.0)
        check_number("soft_temperature", self.soft_temperature, 0.0, 1000.0, is_low_open=True)
        for name in ("hidden_weight", "attention_weight"):
            check_number(name, getattr(self, name), 0.0, 1e6)
        object.__setattr__(self, "layer_map", tuple(self.layer_map or ()) or None)
        self._check_processes()
        self._check_teacher()

    def _check_processes(self) -> None:
        size = self.tensor_parallel
        if self.processes % size:
            raise OptionError(
                f"processes={self.processes} is not a multiple of tensor_parallel={size}",
                hint=f"choose processes={-(-self.processes // size) * size}",
                option="tensor_parallel",
            )
        if self.batch_size % self.num_shares:
            number = "processes" if size == 1 else "processes / tensor_parallel"
            raise OptionError(
                f"batch_size={self.batch_size} is not a multiple of {number} x accumulation,"
                f" {self.num_shares}",
                hint=f"choose {-(-self.batch_size // self.num_shares) * self.num_shares}",
                option="batch_size",
            )
        if self.shard and self.processes == size:
            raise OptionError(
                "shard shares the weights among processes, and there is one"
                + (" for each part of the matrices" if size > 1 else ""),
                hint=f"choose processes={2 * size} or more",
                option="shard",
            )
        if size > 1 and self.is_adapter:
            raise OptionError(
                f"tensor_parallel cannot be had with method={self.method!r}: an adapter is not cut",
                hint="choose full, last-layers or head, or share the weights with shard",
                option="tensor_parallel",
            )
        for name, values in _NOT_IN_PARTS.items() if self.has_parts else ():
            if (value := getattr(self, name)) in values:
                option = "shard" if self.shard else "tensor_parallel"
                raise OptionError(
                    f"{option} cannot be had with {name}={value!r}",
                    hint="leave one of them out",
                    option=option,
                )

    def _check_teacher(self) -> None:
        defaults = {field.name: field.default for field in fields(TuneOptions)}
        changed = [name for name in _OF_TEACHERS if getattr(self, name) != defaults[name]]
        if self.teacher is None and changed:
            raise OptionError(
                f"{changed[0]} is for learning from a teacher", hint="name one: teacher", option=changed[0]
            )
        if self.teacher is not None and self.has_parts:
            option = "shard" if self.shard else "tensor_parallel"
            raise OptionError(
                f"{option} is not for learning from a teacher, which is whole in each process",
                hint="leave one of the two out",
                option=option,
            )
        if self.teacher is not None and self.is_adapter and (self.hidden_weight or self.attention_weight):
            raise OptionError(
                f"hidden_weight and attention_weight are not for method={self.method!r}",
                hint="choose full, last-layers or head",
                option="method",
            )
        if self.teacher_processes > 1 and (self.hidden_weight or self.attention_weight):
            raise OptionError(
                "teacher_processes is not for hidden states and attention maps, which are not kept on disk",
                hint="leave it out, or hidden_weight and attention_weight",
                option="teacher_processes",
            )

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate`, or what the method usually takes."""
        return _LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate

    @property
    def num_shares(self) -> int:
        """Parts that the rows of a batch are dealt out in, over processes and one after the other."""
        return self.processes // self.tensor_parallel * self.accumulation

    @property
    def has_parts(self) -> bool:
        """Whether a process has parts of weights alone."""
        return self.shard or self.tensor_parallel > 1

    @property
    def is_adapter(self) -> bool:
        """Whether the method adds small weights to a model whose own stay."""
        return self.method in ADAPTER_METHODS


# What knows nothing of parts of a weight.
_NOT_IN_PARTS: Mapping[str, tuple[object, ...]] = {
    "optimizer": ("adafactor", "adamw-8bit"),
    "precision": ("fp16",),
    "keep_zeros": (True,),
    "method": ("prefix",),
}

_CHOICES = {
    "optimizer": Optimizer,
    "schedule": Schedule,
    "class_weights": ClassWeights,
    "precision": Precision,
    "method": Method,
    "problem": Problem,
    "device": Device,
}


def read_option_file(path: Path) -> dict[str, Any]:
    """The options that a TOML, YAML or JSON file sets, by name; dashes may stand for underscores.

    Raises:
        OptionError: the file is missing, broken, or names what is no option.
    """
    values = read_mapping(path, option="config")
    known = {field.name for field in fields(TuneOptions)}
    named = {str(name).replace("-", "_"): value for name, value in values.items()}
    if unknown := sorted(named.keys() - known):
        raise OptionError(
            f"{path}: {unknown[0]!r} is no option of tune",
            hint=f"options are {', '.join(sorted(known))}",
            option="config",
        )
    return named


def read_mapping(path: Path, *, option: str) -> Mapping[str, Any]:
    """What a TOML, YAML or JSON file maps names to.

    Raises:
        OptionError: the file is missing, broken, of no such kind, or holds no mapping.
    """
    if not path.is_file():
        raise OptionError(f"{option}: no file is at {path}", hint="give the path of a file", option=option)
    text = path.read_text(encoding="utf-8")
    try:
        values = _parse(path, text)
    except ValueError as error:
        raise OptionError(f"{path} is broken: {error}", hint="mend it", option=option) from error
    if not isinstance(values, Mapping):
        raise OptionError(
            f"{path} holds no mapping of names to values", hint="write NAME: VALUE", option=option
        )
    return values


def _yaml_loader() -> Any:
    """Reads 2e-5 as a number, as YAML 1.2 (section 10.2.1.4) and JSON do; YAML 1.1 asks for a dot."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc] # of its own: resolvers are a class's
        pass

    number = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def _parse(path: Path, text: str) -> Any:
    match path.suffix.lower():
        case ".toml":
            return tomllib.loads(text)
        case ".json":
            return json.loads(text)
        case ".yaml" | ".yml":
            try:
                import yaml
            except ImportError as error:
                raise UnsupportedError(
                    f"{path} needs PyYAML: {error}", hint="pip install pyyaml, or write TOML or JSON"
                ) from error
            try:
                return yaml.load(text, _yaml_loader())  # a SafeLoader
            except yaml.YAMLError as error:
                raise ValueError(" ".join(str(error).split())) from error
    raise OptionError(
        f"{path} is no .toml, .yaml or .json file", hint="rename it, or write it as one of those"
    )
