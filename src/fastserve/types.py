"""Values that cross packages: what a request asks for, what one step runs, what it gives back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fastserve.constraint import Choice, Constraint, Grammar, JsonSchema, Regex
from fastserve.errors import OptionError
from fastserve.option import check_integer, check_kind, check_number

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
UInt8Array = NDArray[np.uint8]
UInt32Array = NDArray[np.uint32]
UInt64Array = NDArray[np.uint64]
Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

MAX_TOP_LOGPROBS = 20
NO_ADAPTER = -1  # in Batch.adapter_slots

EarlyStopping = bool | Literal["never"]
"""When a beam search with as many completions as beams ends: at once, as soon as none that goes on would be
better now (False), or as soon as none could become better ("never" before)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    `max_tokens=None` generates until the context is full; 0, with `prompt_logprobs`, reads the prompt alone.
    `temperature=0` is greedy. `top_k=0`, `top_p=1` and `min_p=0` switch their filters off. `seed=None` draws
    a fresh one per request. `n` completions are made of one prompt, completion i as if it were alone with the
    seed `seed + i`. The penalties follow the OpenAI API (presence, frequency: subtracted from the logits of
    tokens of the completion) and CTRL (repetition, arXiv 1909.05858: divides positive and multiplies negative
    logits of tokens of the prompt and the completion). `logprobs` asks for the log-probabilities of the
    completion's tokens and so many of the likeliest in their places; `prompt_logprobs` for those of the
    prompt's, which is then computed whole, whatever is cached.
    `num_beams` above 1 searches the `n` likeliest completions instead of drawing them, with `length_penalty`
    and `early_stopping` as in `transformers`: the sum of a completion's log-probabilities is divided by its
    length to the power of the penalty. Nothing then comes before the search is over. None is the search that
    an encoder-decoder's own settings name, where nothing else here speaks against one, else 1.
    `constraint` is what the text must be, see `fastserve.constraint`. `skip_special_tokens=False` shows
    tokens in the text that are none, such as those that mark calls of tools.

    >>> SamplingParams(max_tokens=16, temperature=0.7, top_p=0.9, seed=1).temperature
    0.7

    Raises:
        OptionError: a field is out of its range.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    num_beams: int | None = None
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    constraint: Constraint | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        check_integer("n", self.n, low=1)
        if self.max_tokens is not None:
            # Without tokens and without the prompt's log-probabilities nothing would come of the request.
            check_integer("max_tokens", self.max_tokens, low=1 if self.prompt_logprobs is None else 0)
        check_number("temperature", self.temperature, 0.0, 100.0)
        check_integer("top_k", self.top_k, low=0)
        check_number("top_p", self.top_p, 0.0, 1.0, is_low_open=True)
        check_number("min_p", self.min_p, 0.0, 1.0)
        check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, is_low_open=True)
        if self.seed is not None:
            check_integer("seed", self.seed, low=0, high=2**64 - 1)
        if self.logprobs is not None:
            check_integer("logprobs", self.logprobs, low=0, high=MAX_TOP_LOGPROBS)
        if self.prompt_logprobs is not None:
            check_integer("prompt_logprobs", self.prompt_logprobs, low=0, high=MAX_TOP_LOGPROBS)
        if self.num_beams is not None:
            check_integer("num_beams", self.num_beams, low=1)
        check_number("length_penalty", self.length_penalty, -10.0, 10.0)
        self._check_beams()
        check_kind("logit_bias", self.logit_bias, Mapping, "a mapping from token ids to numbers")
        check_kind("stop", self.stop, (str, Sequence), "a text or a sequence of texts")
        check_kind("stop_token_ids", self.stop_token_ids, Sequence, "a sequence of token ids")
        for token_id, bias in self.logit_bias.items():
            check_integer(f"logit_bias[{token_id!r}]", token_id, low=0)
            check_number(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
        for index, token_id in enumerate(self.stop_token_ids):
            check_integer(f"stop_token_ids[{index}]", token_id, low=0)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if self.constraint is not None:
            kinds = (JsonSchema, Regex, Choice, Grammar)
            check_kind("constraint", self.constraint, kinds, "a JsonSchema, Regex, Choice or Grammar")
            if self.ignore_eos:
                raise OptionError(
                    "ignore_eos=True contradicts a constraint, whose end is the completion's",
                    hint="leave one of them out",
                    option="ignore_eos",
                )
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise OptionError(
                    f"stop holds {text!r}", hint="name texts to stop at, none of them empty", option="stop"
                )

    def _check_beams(self) -> None:
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise OptionError(
                f"early_stopping is {self.early_stopping!r}",
                hint="choose true, false or 'never'",
                option="early_stopping",
            )
        if self.num_beams is None:  # whoever knows the model says what that comes to
            return
        plain = SEARCH_OPTIONS if self.num_beams == 1 else OPTIONS_WITHOUT_SEARCH
        changed = [name for name, default in plain.items() if not _is_default(getattr(self, name), default)]
        if changed and self.num_beams == 1:
            raise OptionError(
                f"{changed[0]}={getattr(self, changed[0])!r} is for beam search, and num_beams is 1",
                hint="choose num_beams, or leave it out",
                option=changed[0],
            )
        if changed:
            raise OptionError(
                f"{changed[0]} has no part in beam search, and num_beams is {self.num_beams}",
                hint="leave one of the two out",
                option=changed[0],
            )
        if self.num_beams > 1 and self.n > self.num_beams:
            raise OptionError(
                f"n is {self.n}, and num_beams {self.num_beams}: no more completions are found than beams",
                hint=f"choose num_beams={self.n}, or n={self.num_beams}",
                option="n",
            )


def _is_default(value: object, default: object) -> bool:
    return value == default or (isinstance(value, Collection) and not value)


SEARCH_OPTIONS: Mapping[str, object] = {"length_penalty": 1.0, "early_stopping": False}
OPTIONS_WITHOUT_SEARCH: Mapping[str, object] = {
    "temperature": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": {},
    "stop": (),
    "stop_token_ids": (),
    "ignore_eos": False,
    "logprobs": None,
    "prompt_logprobs": None,
    "constraint": None,
}
"""What has its default in every beam search. The filters of sampling do nothing at temperature 0 anyway."""


def can_search(params: SamplingParams) -> bool:
    """Whether nothing in parameters speaks against a beam search.

    >>> can_search(SamplingParams()), can_search(SamplingParams(temperature=1.0))
    (True, False)
    """
    return all(_is_default(getattr(params, name), plain) for name, plain in OPTIONS_WITHOUT_SEARCH.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingBatch:
    """Sampling of the R output rows of one step, as arrays that the native sampler reads.

    Row r's random number is drawn from a counter keyed by (seeds[r], draws[r]), `draws` being the index of
    the token within its completion: the same token is drawn whatever else is in the batch.
    """

    temperature: Float32Array  # [R]
    top_k: Int32Array  # [R]
    top_p: Float32Array  # [R]
    min_p: Float32Array  # [R]
    presence_penalty: Float32Array  # [R]
    frequency_penalty: Float32Array  # [R]
    repetition_penalty: Float32Array  # [R]
    seeds: UInt64Array  # [R]
    draws: UInt64Array  # [R]
    num_logprobs: Int32Array  # [R] top log-probabilities wanted beside that of the chosen token
    history_starts: Int32Array  # [R + 1] ranges in history_ids; empty where no penalty is on
    history_prompt_lengths: Int32Array  # [R] how many of a range's first ids belong to the prompt
    history_ids: Int32Array  # prompt and completion tokens so far
    bias_starts: Int32Array  # [R + 1] ranges in bias_ids and bias_values
    bias_ids: Int32Array
    bias_values: Float32Array
    mask_starts: Int32Array  # [R + 1] ranges in mask_words; empty where every token may come
    mask_words: UInt32Array  # of ceil(vocab / 32) each: bit i % 32 of word i // 32 says whether token i may


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step's flat ragged batch of S sequences, T tokens and R output rows, without padding.

    Sequence s owns the rows sequence_starts[s]:sequence_starts[s + 1]. Its keys and values live in the blocks
    block_tables[s], position p in block p // block_size at slot p % block_size. After the step it holds
    context_lengths[s] tokens, of which the rows of this step are the last.
    """

    token_ids: Int32Array  # [T]
    positions: Int32Array  # [T]
    sequence_starts: Int32Array  # [S + 1]
    context_lengths: Int32Array  # [S]
    block_tables: Int32Array  # [S, blocks of the longest]
    output_rows: Int32Array  # [R] rows whose logits are wanted
    token_types: Int32Array | None = None  # [T] segment ids of encoders; None is all zero
    adapter_slots: Int32Array | None = None  # [S] of each sequence's adapter, NO_ADAPTER without; None: all
    # Of decoders that read sources: an encoder has stored the source_lengths[s] keys and values of sequence
    # s's source in the blocks source_block_tables[s].
    source_lengths: Int32Array | None = None  # [S]
    source_block_tables: Int32Array | None = None  # [S, blocks of the longest source]
    sampling: SamplingBatch | None = None  # of the R output rows; None leaves the choice to the caller

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.context_lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step gives back. `outputs` are views that the next step overwrites: copy what must live on."""

    outputs: Mapping[str, Float32Array]  # by graph output: "logits" [R, vocab], "embedding" [S, width]
    token_ids: Int32Array | None = None  # [R] sampled, where the batch asked for sampling
    is_valid: BoolArray | None = None  # [R] false where no token could be chosen: logits are NaN or all -inf
    logprobs: Float32Array | None = None  # [R] of the sampled tokens, before filters and temperature
    top_token_ids: Int32Array | None = None  # [R, MAX_TOP_LOGPROBS], rows valid up to their num_logprobs
    top_logprobs: Float32Array | None = None  # [R, MAX_TOP_LOGPROBS]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Capacities that an executable is compiled for; a batch beyond them is refused."""

    max_tokens: int = 512  # rows of one step
    max_outputs: int = 64  # output rows of one step
    max_sequences: int = 64
    num_blocks: int = 256  # KV blocks in the pool
    max_context: int = 8192  # positions a sequence may reach; sizes the rotary table
    num_adapter_slots: int = 0  # adapters that one step may use; 0: none are ever set
    max_adapter_rank: int = 64  # of each matrix of an adapter


@dataclass(frozen=True, slots=True)
class LowRankMatrices:
    """What an adapter makes of the result y [out] = W x + bias of a matrix W [out, in]: factors * y + shifts
    + up (down x), any scaling included. Without `factors` it is y + up (down x).

    Of a DoRA adapter (arXiv 2402.09353, section 4), the factors are what W's rows are scaled by; where an
    adapter replaces a layer they are 0.
    """

    down: Float32Array  # [rank, in]
    up: Float32Array  # [out, rank]
    factors: Float32Array | None = None  # [out]
    shifts: Float32Array | None = None  # [out], where there are factors


class Executable(Protocol):
    """A compiled graph with its weights and its KV pool.

    One thread at a time calls `run`. Another may call `read_block`, `write_block` and `copy_block` meanwhile,
    for blocks that the running batch does not name.
    """

    @property
    def limits(self) -> Limits: ...

    @property
    def block_size(self) -> int:
        """Tokens that one KV block holds."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block over all layers, as it is stored."""
        ...

    @property
    def is_pool_on_host(self) -> bool:
        """Whether the KV pool lies in this machine's memory, so that what is slower than it is a disk."""
        ...

    def run(self, batch: Batch) -> StepResult:
        """Run one step. The batch is only read; blocks named in it are written at the positions of its rows.

        Raises:
            OptionError: the batch exceeds `limits` or is inconsistent.
        """
        ...

    def set_adapter(self, slot: int, matrices: Mapping[str, LowRankMatrices] | None) -> None:
        """Have sequences of this slot (`Batch.adapter_slots`) use an adapter from the next step on, in place
        of what was there; None empties the slot. Not while a step runs.

        Args:
            matrices: by the name of the tensor that each is added to, which is a linear's, of an
                encoder-decoder of either part; copied.

        Raises:
            OptionError: there is no such slot, or a matrix has no linear, another shape, or too high a rank.
        """
        ...

    def read_block(self, block: int, out: UInt8Array) -> None:
        """Copy a block's keys and values of all layers out, bit by bit, in an order of the backend's own.

        Args:
            out: [block_bytes], contiguous and writable.

        Raises:
            ValueError: there is no such block, or `out` has another size.
        """
        ...

    def write_block(self, block: int, data: UInt8Array) -> None:
        """Put back what `read_block` copied out, into this or another block: whoever attends to it reads the
        same keys and values. Arguments and errors as of `read_block`."""
        ...

    def copy_block(self, source: int, target: int) -> None:
        """Make `target` hold what `source` does.

        Raises:
            ValueError: there is no such block.
        """
        ...


@runtime_checkable
class SourceExecutable(Executable, Protocol):
    """An encoder and the decoder that reads what it stores, over one KV pool. `run` is the decoder's."""

    @property
    def source_vocab_size(self) -> int:
        """Of the tokens that sources have."""
        ...

    def encode(self, batch: Batch) -> None:
        """Read whole sources: afterwards the blocks named in the batch hold their keys and values, which
        steps of the decoder find by `source_block_tables`.

        Raises:
            OptionError: as `run`.
        """
        ...


JsonObject = Mapping[str, Any]
