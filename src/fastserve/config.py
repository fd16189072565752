"""Options of the engine: frozen, validated when made, with one name as field, argument and flag."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, Self, get_args

from fastserve.errors import OptionError
from fastserve.option import INT64_MAX, check_choice, check_integer, check_kind, check_number

# How matrices are kept in memory; `fastserve.backends.native.weight_scheme` says what each name stands for.
WeightFormat = Literal[
    "f32",
    "f16",
    "bf16",
    "int8",
    "int8:g32",
    "int8:g64",
    "int4",
    "int4:g32",
    "int4:g128",
    "int4:asymmetric",
    "int4:g32:asymmetric",
    "int4:g128:asymmetric",
    "stored",
]
WeightsChoice = Literal["auto", WeightFormat]
KvDtype = Literal["f32", "f16", "bf16", "int8"]
Backend = Literal["native", "torch"]
PrefixCache = Literal["lru", "lfu", "off"]
PrefixScope = Literal["tenant", "all"]
FairShare = Literal["tenant", "off"]
UnknownTenants = Literal["admit", "refuse"]
Speculation = Literal["off", "prompt-lookup", "draft"]

DEFAULT_CONTEXT_LENGTH = 8192  # keeps the KV memory of a long-context model within a small machine
DEFAULT_MAX_ADAPTERS = 4
MOST_ADAPTER_SLOTS = 1024
DEFAULT_ADAPTER_RANK, MOST_ADAPTER_RANK = 64, 4096

PRIORITY_CLASSES = ("interactive", "standard", "batch")
MOST_TIMEOUT_MS = 7 * 24 * 3600 * 1000.0
MOST_TENANT_WEIGHT = 1e6
MOST_DRAFT_TOKENS = 64
MOST_NGRAM_TOKENS = 64
MOST_GAP_SECONDS = 60.0  # with so much time for a step, all rows go to prompts that wait

_UNIT_BYTES = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleOptions:
    """How sequences share steps and memory.

    Attributes:
        policy: who goes first: `NAME` or `NAME:KNOB=VALUE,...`, see `fastserve.engine.policy`.
        prefill_chunk_tokens: most tokens of one prompt in one step; None is as many as the step takes.
        target_gap_seconds: how long a step may take while sequences decode, which is the time between two
            tokens of a stream; None adapts to the decodes and to the prompts that wait (see
            `fastserve.engine.pace`).
        most_slack_seconds: how much longer a step may take where all sequences that decode have saved it
            up, by tokens that came sooner than the target; 0 is none.
        peak_quantile: a sequence is let in when the pool holds what all that are in are expected to grow
            to: each by this quantile of what completions like it went on for (see `fastserve.engine.peak`).
            0 expects nothing: it is let in when the pool holds what they have now.
        pause_budget_seconds: how long a stream may be paused for others in all; then it goes first to its
            end (see `fastserve.engine.pause`; `mlfq-published` does not have it). None is no limit.
        first_token_seconds: an objective: requests whose first token cannot come so soon after their arrival
            go behind those of their tenant whose can (see `fastserve.engine.relegation`). None is none.
        prefix_cache: which prefix of earlier requests is given up first when memory is needed, the least
            recently or the least frequently used; `off` keeps none.
        share_prefixes: with whom: requests of the same tenant, or all.
        fair_share: between whom service is shared fairly before the policy is asked: tenants, or `off` (see
            `fastserve.engine.tenant`).
        tenant_weights: by tenant, above 0 up to MOST_TENANT_WEIGHT; who is not named has 1. Under contention
            one with twice the weight gets twice the service.
        unknown_tenants: whether requests of tenants without a weight are admitted or refused.
        priority_classes: names, the best first: a request of a better class goes before all of a worse one,
            whatever the policy.
        default_class: that of requests that name none.
        max_waiting: most requests that wait for their first turn; more are refused. None is no limit.
        queue_timeout_ms: how long a request may wait for its first turn; None is for ever.
        session_idle_seconds: a session without requests for so long is forgotten.
        speculation: whether several tokens of a sequence are verified in one step where that pays:
            `prompt-lookup` guesses them from earlier places of its own text, `draft` by a second, smaller
            model (see `fastserve.engine.speculator`). Completions are the same.
        max_draft_tokens: most tokens that are guessed for a sequence in one step.
        prompt_lookup_min: tokens that must have occurred before, for a guess at what follows them.
        prompt_lookup_max: of several places the one that agrees with the most tokens is taken, up to so many.
    """

    policy: str = "boost"
    prefill_chunk_tokens: int | None = None
    target_gap_seconds: float | None = None
    most_slack_seconds: float = 0.1
    peak_quantile: float = 0.6
    pause_budget_seconds: float | None = 1.8
    first_token_seconds: float | None = None
    prefix_cache: PrefixCache = "lru"
    share_prefixes: PrefixScope = "tenant"
    fair_share: FairShare = "tenant"
    tenant_weights: Mapping[str, float] | None = None
    unknown_tenants: UnknownTenants = "admit"
    priority_classes: Sequence[str] = PRIORITY_CLASSES
    default_class: str = "standard"
    max_waiting: int | None = None
    queue_timeout_ms: float | None = None
    session_idle_seconds: float = 600.0
    speculation: Speculation = "off"
    max_draft_tokens: int = 8
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 4

    def __post_init__(self) -> None:
        self._check_tenants()
        self._check_classes()
        if self.max_waiting is not None:
            check_integer("max_waiting", self.max_waiting, low=1)
        if self.queue_timeout_ms is not None:
            check_number("queue_timeout_ms", self.queue_timeout_ms, 0, MOST_TIMEOUT_MS, is_low_open=True)
        check_number("session_idle_seconds", self.session_idle_seconds, 1, MOST_TIMEOUT_MS / 1000)
        check_choice("speculation", self.speculation, get_args(Speculation))
        _check_speculation(self)
        check_choice("prefix_cache", self.prefix_cache, get_args(PrefixCache))
        check_choice("share_prefixes", self.share_prefixes, get_args(PrefixScope))
        if self.prefill_chunk_tokens is not None:
            check_integer("prefill_chunk_tokens", self.prefill_chunk_tokens, low=1)
        if self.target_gap_seconds is not None:
            check_number("target_gap_seconds", self.target_gap_seconds, 0.001, MOST_GAP_SECONDS)
        check_number("most_slack_seconds", self.most_slack_seconds, 0.0, MOST_GAP_SECONDS)
        check_number("peak_quantile", self.peak_quantile, 0.0, 0.99)
        if self.pause_budget_seconds is not None:
            check_number("pause_budget_seconds", self.pause_budget_seconds, 0.0, MOST_TIMEOUT_MS / 1000)
        if self.first_token_seconds is not None:
            check_number("first_token_seconds", self.first_token_seconds, 0.001, MOST_TIMEOUT_MS / 1000)

    def _check_tenants(self) -> None:
        check_choice("fair_share", self.fair_share, get_args(FairShare))
        check_choice("unknown_tenants", self.unknown_tenants, get_args(UnknownTenants))
        if self.tenant_weights is None:
            if self.unknown_tenants == "refuse":
                raise OptionError(
                    "unknown_tenants='refuse' without tenant_weights would refuse everybody",
                    hint="name the tenants in tenant_weights",
                )
            return
        check_kind("tenant_weights", self.tenant_weights, Mapping, "a mapping from tenants to weights")
        if self.fair_share == "off" and self.unknown_tenants == "admit":
            raise OptionError(
                "tenant_weights has no use with fair_share='off'", hint="leave one of the two out"
            )
        check_tenant_weights(self.tenant_weights)

    def _check_classes(self) -> None:
        names = self.priority_classes
        is_list = isinstance(names, Sequence) and not isinstance(names, str)
        if not is_list or not names or not all(isinstance(name, str) and name for name in names):
            raise OptionError(
                f"priority_classes={names!r} is not a sequence of names",
                hint="name at least one class, the best first",
            )
        if len(set(names)) < len(names):
            raise OptionError(f"priority_classes={names!r} has a name twice", hint="name each class once")
        check_choice("default_class", self.default_class, tuple(names))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions(ScheduleOptions):
    """How a model is loaded and run.

    Attributes:
        weights: format of the linear layers' weights. `auto` is int8 for text generation, which is bound by
            the bandwidth that weights are read with; f32 for encoders, but `stored` for those that are stored
            as whole numbers; f32 on the torch backend. int8 has a scale for each row, int4 for 64 columns of
            it and no zero point, unless `:g32`, `:g64`, `:g128` (columns that share a scale) and
            `:asymmetric` say otherwise. With int4, embeddings and the head are int8. What a checkpoint has as
            whole numbers of no more bits (compressed-tensors, GPTQ, AWQ, ours) is not rounded again: it keeps
            its own groups. `stored` keeps all numbers of the file without rounding (q4_0, q4_1, q8_0, ...).
        kv_dtype: format of the keys and values of past tokens. int8 has a scale for each token and head.
        threads: of the native backend, up to four for each core that this process may use, or 64 where that
            is more; None takes those cores.
        context_length: tokens that a prompt and its completion may have together; None takes the model's own,
            up to DEFAULT_CONTEXT_LENGTH.
        backend: `native` runs on the CPU without torch; `torch` is the reference.
        device: where the torch backend computes: `cpu`, `cuda`, `cuda:1`, `mps`, ...; None is `cpu`.
        max_batch_tokens: most tokens of one step; None is 512, and of an encoder 2048, so that all threads
            have texts to the end. An encoder's step takes a whole text, whatever this says.
        max_sequences: most sequences that run at once.
        kv_memory: bytes for keys and values, or a text such as "512MiB"; None derives it from what is free.
        kv_spill: bytes of slower memory that keys and values of sequences that wait can go to, or a text such
            as "1GiB": a file where the model runs on the CPU, else host memory. None and 0 are off.
        spill_dir: folder for that file; None is the system's folder of temporary files, or /var/tmp where
            that one lies in memory.
        draft_model: a folder or .gguf file, or, for LLM and AsyncLLM, a name: the model that guesses with
            speculation="draft", of the same vocabulary. None is the model itself, made smaller by the next
            two.
        draft_weights: format of its weights, as `weights`.
        draft_layers: how many of its layers are computed, from the first; what they say has not been trained
            to be the end. None is all.
        draft_kv_memory: bytes for its keys and values, or a text such as "64MiB"; None is a fourth of the
            model's own. What is used least gives way.
        adapters: folders of adapters, as peft saves them, by name: requests choose one that is added to the
            model's weights for them. LoRA or DoRA; a draft model has none.
        max_adapters: how many the sequences of one step may use; those of others wait. There may be more.
            None is DEFAULT_MAX_ADAPTERS where there are adapters, else 0: none can be loaded later.
        max_adapter_rank: the highest rank that an adapter may have.

    The others are those of ScheduleOptions.

    >>> EngineOptions(weights="int8", kv_memory="1GiB").kv_memory_bytes
    1073741824

    Raises:
        OptionError: an option is out of its range.
    """

    weights: WeightsChoice = "auto"
    kv_dtype: KvDtype = "f16"
    threads: int | None = None
    context_length: int | None = None
    backend: Backend = "native"
    device: str | None = None
    max_batch_tokens: int | None = None
    max_sequences: int = 64
    kv_memory: int | str | None = None
    kv_spill: int | str | None = None
    spill_dir: str | Path | None = None
    draft_model: str | Path | None = None
    draft_weights: WeightsChoice = "auto"
    draft_layers: int | None = None
    draft_kv_memory: int | str | None = None
    adapters: Mapping[str, str | Path] | None = None
    max_adapters: int | None = None
    max_adapter_rank: int = DEFAULT_ADAPTER_RANK

    def __post_init__(self) -> None:
        ScheduleOptions.__post_init__(self)
        check_choice("weights", self.weights, get_args(WeightsChoice))
        check_choice("kv_dtype", self.kv_dtype, get_args(KvDtype))
        check_choice("backend", self.backend, get_args(Backend))
        check_integer("max_sequences", self.max_sequences, low=1)
        for name in ("threads", "context_length", "max_batch_tokens"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), low=1)
        if self.kv_memory is not None:
            check_integer("kv_memory", self.kv_memory_bytes, low=1, high=INT64_MAX)
        if self.device is not None:
            check_kind("device", self.device, str, "the name of a device of PyTorch, such as cuda")
            if self.backend == "native":
                raise OptionError(
                    f"device={self.device!r} does not work with backend='native', which computes on the CPU",
                    hint="leave device out, or use backend='torch'",
                )
        check_integer("kv_spill", self.kv_spill_bytes, low=0, high=INT64_MAX)
        if self.spill_dir is not None:
            check_kind("spill_dir", self.spill_dir, (str, Path), "a folder")
            if not self.kv_spill_bytes:
                raise OptionError(
                    f"spill_dir={str(self.spill_dir)!r} has no use without kv_spill",
                    hint="say with kv_spill how much may be kept there",
                )
        self._check_draft()
        self._check_adapters()
        if self.backend == "torch":
            _refuse_with_torch("threads", self.threads, (None,))
            _refuse_with_torch("weights", self.weights, ("auto", "f32"))
            if self.speculation != "off":  # its products differ in the last bits with the rows of a step
                raise OptionError(
                    f"speculation={self.speculation!r} does not work with backend='torch', whose tokens may "
                    "depend on the rows of a step",
                    hint="leave speculation out, or use backend='native'",
                )

    def without_adapters(self) -> Self:
        """The same, with room for none."""
        return replace(self, adapters=None, max_adapters=0, max_adapter_rank=DEFAULT_ADAPTER_RANK)

    @property
    def num_adapter_slots(self) -> int:
        """What `max_adapters` comes to."""
        if self.max_adapters is not None:
            return self.max_adapters
        return DEFAULT_MAX_ADAPTERS if self.adapters else 0

    @property
    def kv_memory_bytes(self) -> int | None:
        return parse_bytes("kv_memory", self.kv_memory) if isinstance(self.kv_memory, str) else self.kv_memory

    @property
    def draft_kv_memory_bytes(self) -> int | None:
        size = self.draft_kv_memory
        return parse_bytes("draft_kv_memory", size) if isinstance(size, str) else size

    @property
    def kv_spill_bytes(self) -> int:
        if self.kv_spill is None:
            return 0
        return parse_bytes("kv_spill", self.kv_spill) if isinstance(self.kv_spill, str) else self.kv_spill

    def _check_adapters(self) -> None:
        if self.adapters is not None:
            check_kind("adapters", self.adapters, Mapping, "a mapping from names to folders")
        if self.max_adapters is not None:
            check_integer("max_adapters", self.max_adapters, low=0, high=MOST_ADAPTER_SLOTS)
            if self.adapters and not self.max_adapters:
                raise OptionError(
                    "max_adapters=0 leaves no room for the adapters that are named",
                    hint="raise max_adapters, or leave adapters out",
                )
        check_integer("max_adapter_rank", self.max_adapter_rank, low=1, high=MOST_ADAPTER_RANK)
        if not self.num_adapter_slots and self.max_adapter_rank != DEFAULT_ADAPTER_RANK:
            raise OptionError(
                f"max_adapter_rank={self.max_adapter_rank} has no use where there is room for no adapters",
                hint="name adapters, or set max_adapters",
            )

    def _check_draft(self) -> None:
        if self.draft_model is not None:
            check_kind("draft_model", self.draft_model, (str, Path), "the name or the folder of a model")
        check_choice("draft_weights", self.draft_weights, get_args(WeightsChoice))
        if self.draft_layers is not None:
            check_integer("draft_layers", self.draft_layers, low=1)
        if self.draft_kv_memory is not None:
            check_integer("draft_kv_memory", self.draft_kv_memory_bytes, low=1, high=INT64_MAX)
        if self.speculation != "draft":
            names = ("draft_model", "draft_weights", "draft_layers", "draft_kv_memory")
            _refuse_without_use(self, names, "choose speculation='draft'")
        elif self.draft_model is None and self.draft_layers is None and self.draft_weights == "auto":
            raise OptionError(
                "speculation='draft' has no draft model: as it is, the model itself saves nothing",
                hint="name a draft_model, or choose draft_layers or draft_weights",
            )


def check_tenant_weights(weights: Mapping[str, float]) -> None:
    """
    Raises:
        OptionError: a tenant is no name, or its weight not above 0 and at most MOST_TENANT_WEIGHT.
    """
    for tenant, weight in weights.items():
        check_kind("a tenant of tenant_weights", tenant, str, "a name")
        name = f"tenant_weights[{tenant!r}]"
        check_number(name, weight, 0, MOST_TENANT_WEIGHT, is_low_open=True)


def parse_bytes(name: str, text: str) -> int:
    """A size as people write it.

    >>> parse_bytes("kv_memory", "1.5 GiB")
    1610612736

    Raises:
        OptionError: it is not a number with a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNIT_BYTES:
        raise OptionError(
            f"{name}={text!r} is not a size", hint="write bytes, or a number with KiB, MiB, GiB, kB, MB or GB"
        )
    return int(float(match[1]) * _UNIT_BYTES[match[2]])


def _check_speculation(options: ScheduleOptions) -> None:
    check_integer("max_draft_tokens", options.max_draft_tokens, low=1, high=MOST_DRAFT_TOKENS)
    check_integer("prompt_lookup_min", options.prompt_lookup_min, low=1, high=MOST_NGRAM_TOKENS)
    check_integer("prompt_lookup_max", options.prompt_lookup_max, low=1, high=MOST_NGRAM_TOKENS)
    if options.prompt_lookup_max < options.prompt_lookup_min:
        raise OptionError(
            f"prompt_lookup_max={options.prompt_lookup_max} is less than "
            f"prompt_lookup_min={options.prompt_lookup_min}",
            hint="choose a prompt_lookup_max of at least prompt_lookup_min",
        )
    if options.speculation == "off":
        _refuse_without_use(options, ("max_draft_tokens",), "choose a kind of speculation")
    if options.speculation != "prompt-lookup":
        names = ("prompt_lookup_min", "prompt_lookup_max")
        _refuse_without_use(options, names, "choose speculation='prompt-lookup'")


def _refuse_without_use(options: ScheduleOptions, names: Sequence[str], hint: str) -> None:
    """Raise where one of these fields is not as it is by default: the kind of speculation has no use for
    it."""
    defaults = {field.name: field.default for field in fields(options)}
    for name in names:
        value = getattr(options, name)
        if value != defaults[name]:
            shown = repr(str(value) if isinstance(value, Path) else value)
            raise OptionError(
                f"{name}={shown} has no use with speculation={options.speculation!r}", hint=hint
            )


def _refuse_with_torch(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise OptionError(
            f"{name}={value!r} does not work with backend='torch', which computes in f32 on torch's threads",
            hint=f"leave {name} out, or use backend='native'",
        )
