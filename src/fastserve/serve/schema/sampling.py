"""Fields that all requests which generate text have: how tokens are chosen, and whose request it is.

Ranges are those of `SamplingParams` and `Engine.add`, which check them; names too, where OpenAI has none.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from pydantic import Field

from fastserve.constraint import Constraint
from fastserve.engine.prompt import Prompt
from fastserve.errors import OptionError
from fastserve.serve.generation import GenerationRequest
from fastserve.serve.schema.body import Name
from fastserve.serve.schema.constraint import ConstraintFields
from fastserve.types import EarlyStopping, SamplingParams


class SamplingFields(ConstraintFields):
    """Those of OpenAI's APIs that we have, then ours."""

    n: int | None = Field(None, description="Completions of a prompt; 1 by default.")
    temperature: float | None = Field(None, description="0 is greedy; 1 by default.")
    top_p: float | None = Field(None, description="Above 0, at most 1, which is the default and off.")
    seed: int | None = Field(None, description="Repeats the completion.")
    stop: str | list[str] | None = Field(None, description="Ends a completion, which is left without it.")
    presence_penalty: float | None = Field(None, description="-2 to 2.")
    frequency_penalty: float | None = Field(None, description="-2 to 2.")
    logit_bias: dict[str, float] | None = Field(None, description="By token id, -100 to 100.")
    user: Name | None = Field(
        None, description="Where there are no keys, the tenant: tenants share the model fairly."
    )

    top_k: int | None = Field(None, description="Choose among so many tokens; 0 is off.")
    min_p: float | None = Field(None, description="Leave out tokens less likely than this share of the best.")
    num_beams: int | None = Field(
        None, description="Above 1, search the n likeliest completions so wide; temperature is then 0."
    )
    length_penalty: float | None = Field(
        None, description="Of a search: above 0 it favours long completions; 1 by default."
    )
    early_stopping: EarlyStopping | None = Field(
        None,
        description="Of a search: end with as many completions as beams; never: once none is better.",
    )
    repetition_penalty: float | None = Field(None, description="Above 0 to 100; 1 is off.")
    stop_token_ids: list[int] | None = Field(None, description="Tokens that end a completion.")
    ignore_eos: bool | None = Field(None, description="Go on after the model's own end.")
    priority: int | None = Field(None, description="The lower goes first, with policies that look at it.")
    priority_class: str | None = Field(None, description="A class of the server; better ones go first.")
    timeout_ms: float | None = Field(None, description="The answer is to be complete within this time.")
    session: Name | None = Field(None, description="Of the tenant's program whose requests belong together.")

    def to_request(
        self,
        prompts: Seq[Prompt],
        *,
        tenant: str,
        max_tokens: int | None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        constraint: Constraint | None,
        skip_special_tokens: bool = True,
    ) -> GenerationRequest:
        """What is asked of the engine. `constraint` is what `to_constraint` gives, or what tools make of it.

        Raises:
            OptionError: a field is out of its range.
        """
        fields: dict[str, Any] = {
            "n": self.n,
            "top_p": self.top_p,
            "seed": self.seed,
            "stop": self.stop,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "num_beams": self.num_beams,
            "length_penalty": self.length_penalty,
            "early_stopping": self.early_stopping,
            "repetition_penalty": self.repetition_penalty,
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": self.ignore_eos,
        }
        temperature = self.temperature
        if temperature is None:
            temperature = 1.0 if (self.num_beams or 1) == 1 else 0.0  # OpenAI's default; none of a search
        params = SamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            constraint=constraint,
            skip_special_tokens=skip_special_tokens,
            logit_bias=_to_token_ids(self.logit_bias or {}),
            **{name: value for name, value in fields.items() if value is not None},
        )
        return GenerationRequest(
            prompts=prompts,
            params=params,
            tenant=tenant,
            session=self.session or "",
            priority=self.priority or 0,
            priority_class=self.priority_class,
            timeout_ms=self.timeout_ms,
        )


def _to_token_ids(biases: dict[str, float]) -> dict[int, float]:
    """JSON has no whole numbers as keys."""
    for key in biases:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise OptionError(
                f"logit_bias names {key[:40]!r}, which is no token id",
                hint="write token ids in digits, as /tokenize gives them",
                option="logit_bias",
            )
    return {int(key): bias for key, bias in biases.items()}
