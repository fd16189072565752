"""Which requests a model can run at all, however long they wait: what is out of range is refused by name."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Seq

import numpy as np

from fastserve.checkpoint.generation import TargetRules
from fastserve.config import ScheduleOptions
from fastserve.engine.beam_search import most_beams
from fastserve.errors import ContextLengthError, MemoryLimitError, OptionError
from fastserve.option import check_choice, check_kind
from fastserve.types import Limits, SamplingParams


class Capability:
    """What an engine was made for.

    Args:
        context_length: tokens that a prompt and its completion may have together.
        kv_tokens: tokens whose keys and values the memory holds.
        num_eos_tokens: how many tokens end a completion.
        target_rules: of an encoder-decoder, whose source and target have a context each.
        source_vocab_size: of an encoder-decoder, of its sources; `vocab_size` is then of its targets.
    """

    def __init__(
        self,
        limits: Limits,
        options: ScheduleOptions,
        *,
        context_length: int,
        kv_tokens: int,
        vocab_size: int,
        block_size: int,
        num_eos_tokens: int = 1,
        target_rules: TargetRules | None = None,
        source_vocab_size: int | None = None,
    ) -> None:
        self._limits = limits
        self._options = options
        self._context_length = context_length
        self._kv_tokens = kv_tokens
        self._vocab_size = vocab_size
        self._source_vocab_size = source_vocab_size
        self._block_size = block_size
        self._num_eos_tokens = num_eos_tokens
        self._target_rules = target_rules
        self._tenants = frozenset(options.tenant_weights or ())

    def check(self, prompt_ids: Seq[int], params: SamplingParams) -> int:
        """How many tokens a completion of this prompt may have.

        Raises:
            OptionError: the prompt is empty, or names a token that is not in the vocabulary; more completions
                are asked for than a step has output rows.
            ContextLengthError: the prompt, with `max_tokens`, does not fit the context.
            MemoryLimitError: it does not fit the KV memory, even alone.
        """
        has_source = self._target_rules is not None
        fit = _fit_target if has_source else fit_max_tokens
        max_tokens = fit(len(prompt_ids), params.max_tokens, self._context_length)
        if has_source and params.prompt_logprobs is not None:
            raise OptionError(
                "prompt_logprobs is for decoders; the prompt of an encoder-decoder has none",
                hint="leave prompt_logprobs out",
                option="prompt_logprobs",
            )
        if params.num_beams is not None and params.num_beams > 1:
            self._check_beams(params.num_beams)
        _check_token_ids("prompt", prompt_ids, self._source_vocab_size or self._vocab_size)
        _check_token_ids("logit_bias", tuple(params.logit_bias), self._vocab_size)
        if params.n > self._limits.max_outputs:
            raise OptionError(
                f"n is {params.n}; a step has {self._limits.max_outputs} output rows",
                hint="ask for fewer completions, or load the model with a larger max_sequences",
                option="n",
            )
        num_prompt_tokens = len(prompt_ids)
        if has_source:  # in blocks of its own, and the token that begins the target
            num_prompt_tokens = -(-num_prompt_tokens // self._block_size) * self._block_size + 1
        return self._fit_memory(num_prompt_tokens, params.max_tokens, max_tokens)

    def _check_beams(self, num_beams: int) -> None:
        if self._options.speculation != "off":
            raise OptionError(
                f"num_beams is {num_beams}, and speculation is {self._options.speculation!r}",
                hint="leave num_beams out, or load the model without speculation",
                option="num_beams",
            )
        num_spare = self._target_rules.num_spare if self._target_rules else 0
        most = most_beams(self._vocab_size, self._num_eos_tokens, num_spare)
        most = max(min(most, self._limits.max_outputs), 1)  # a model may suppress more than a step tells
        if num_beams > most:
            raise OptionError(
                f"num_beams is {num_beams}; the limit of this model is {most}",
                hint=f"choose num_beams from 1 to {most}",
                option="num_beams",
            )

    def set_tenants(self, tenants: Collection[str]) -> None:
        """These are the tenants that are known from now on."""
        self._tenants = frozenset(tenants)

    def check_tenant(self, tenant: str) -> None:
        """
        Raises:
            OptionError: there is no such tenant.
        """
        check_kind("tenant", tenant, str, "a name")
        if self._options.unknown_tenants == "refuse" and tenant not in self._tenants:
            raise OptionError(
                f"tenant {tenant!r} is unknown: it is none of the {len(self._tenants)} of tenant_weights",
                hint="name one of them, or load the model with unknown_tenants='admit'",
                option="tenant",
            )

    def class_index(self, priority_class: str | None) -> int:
        """Place of a class, the best first.

        Raises:
            OptionError: there is no such class.
        """
        classes = tuple(self._options.priority_classes)
        if priority_class is None:
            priority_class = self._options.default_class
        check_choice("priority_class", priority_class, classes)
        return classes.index(priority_class)

    def _fit_memory(self, num_prompt_tokens: int, wanted: int | None, max_tokens: int) -> int:
        """`max_tokens`, or, where the request names none, what the KV memory holds beside the prompt.

        The last token of a completion is never computed, so it needs no place; those of the prompt all are.
        """
        held = self._kv_tokens
        room = held + 1 - num_prompt_tokens
        if room < (wanted or 1):
            raise MemoryLimitError(
                f"the request needs keys and values of {num_prompt_tokens + (wanted or 1) - 1} tokens; "
                f"the KV memory holds {held}",
                hint="shorten the prompt or max_tokens, or load the model with a larger kv_memory",
            )
        return min(max_tokens, room)


def _check_token_ids(name: str, token_ids: Seq[int], size: int) -> None:
    for token_id in token_ids:
        if not isinstance(token_id, int | np.integer):
            raise OptionError(
                f"{name} has {token_id!r} among its tokens",
                hint="give a text, or whole numbers",
                option=name,
            )
        if not 0 <= token_id < size:
            raise OptionError(
                f"{name} names token {token_id}, outside the model's vocabulary of {size}",
                hint=f"token ids are 0 to {size - 1}",
                option=name,
            )


def _fit_target(num_source_tokens: int, max_tokens: int | None, context_length: int) -> int:
    """How long the target of a source may be. Raises as `fit_max_tokens`."""
    if num_source_tokens == 0:
        raise OptionError("the prompt has no tokens", hint="give at least one character", option="prompt")
    if num_source_tokens > context_length:
        raise ContextLengthError(
            f"the prompt has {_tokens(num_source_tokens)}; the encoder reads {context_length}",
            hint="shorten the prompt, or load the model with a larger context_length if it allows one",
        )
    if max_tokens is not None and max_tokens > context_length:
        raise ContextLengthError(
            f"max_tokens is {max_tokens}; the decoder writes {context_length} tokens",
            hint=f"ask for max_tokens of at most {context_length}",
        )
    return context_length if max_tokens is None else max_tokens


def fit_max_tokens(num_prompt_tokens: int, max_tokens: int | None, context_length: int) -> int:
    """How long a completion may be: `max_tokens`, or up to the end of the context where it is None.

    Raises:
        OptionError: the prompt is empty.
        ContextLengthError: they do not fit the context.
    """
    if num_prompt_tokens == 0:
        raise OptionError("the prompt has no tokens", hint="give at least one character", option="prompt")
    left = context_length - num_prompt_tokens
    if left < 0 or (left == 0 and max_tokens != 0):
        more = "" if max_tokens == 0 else " and must hold at least one more"
        raise ContextLengthError(
            f"the prompt has {_tokens(num_prompt_tokens)}; the context is {context_length} tokens{more}",
            hint="shorten the prompt, or load the model with a larger context_length if it allows one",
        )
    if max_tokens is not None and max_tokens > left:
        raise ContextLengthError(
            f"the prompt has {_tokens(num_prompt_tokens)} and max_tokens is {max_tokens}, together "
            f"{num_prompt_tokens + max_tokens}; the context is {context_length} tokens",
            hint=f"ask for max_tokens of at most {left}, or leave it out to go on until the context is full",
        )
    return left if max_tokens is None else max_tokens


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"
