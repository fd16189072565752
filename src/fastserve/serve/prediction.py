"""From what a request gives an encoder to what comes of it: the one way of all routes for classic tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from starlette.requests import Request

from fastserve.engine.async_encoder import AsyncEncoder
from fastserve.engine.encoder import EncoderInput
from fastserve.engine.task.prepared import Prepared, finish_all, inputs_of
from fastserve.errors import ContextLengthError, OptionError, QueueFullError
from fastserve.serve.connection import run_while_connected
from fastserve.serve.errors import naming
from fastserve.serve.limiter import Admission
from fastserve.serve.metrics import Metrics
from fastserve.serve.options import ServeOptions
from fastserve.serve.record import RequestRecord
from fastserve.serve.security import account_of
from fastserve.serve.tenant_table import Tenant
from fastserve.types import Float32Array

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked(Generic[T]):
    """One thing to predict.

    Attributes:
        place: its text, as the request has it.
        prompts: for the log.
        prepare: makes of it what is run; in a thread, as it takes long.
    """

    place: str
    prompts: Seq[object]
    prepare: Callable[[], Prepared[T]]


@dataclass(frozen=True, slots=True)
class Predicted(Generic[T]):
    """The predictions of a request, and the tokens that were read."""

    predictions: list[T]
    num_tokens: int

    @property
    def usage(self) -> dict[str, int]:
        return usage_of(self.num_tokens)


async def predict(
    encoder: AsyncEncoder,
    asked: Seq[Asked[T]],
    request: Request,
    *,
    options: ServeOptions,
    metrics: Metrics,
    tenant: str,
) -> Predicted[T]:
    """Predict all that a request asks for.

    Raises:
        RequestError: one of them cannot be, by the name of its place.
        OptionError: they are too many.
        RateLimitError: the tenant is over one of its limits.
        QueueFullError, StepError: see `AsyncEncoder.run`.
    """
    check_count(len(asked), options, place=asked[min(options.max_prompts, len(asked) - 1)].place)
    prepared = await asyncio.to_thread(_prepare_all, asked)
    for one, own in zip(asked, prepared, strict=True):
        check_tokens(own.num_tokens, options, place=one.place)
    inputs = inputs_of(prepared)
    results: Seq[Float32Array] = ()
    if inputs:
        prompts = [prompt for one in asked for prompt in one.prompts]
        results = await run_inputs(
            encoder, inputs, request, options=options, metrics=metrics, tenant=tenant, prompts=prompts
        )
    predictions = await asyncio.to_thread(finish_all, prepared, results)
    return Predicted(predictions, sum(map(len, inputs)))


async def run_inputs(
    encoder: AsyncEncoder,
    inputs: Seq[EncoderInput],
    request: Request,
    *,
    options: ServeOptions,
    metrics: Metrics,
    tenant: str,
    prompts: Seq[object],
) -> list[Float32Array]:
    """What comes of the inputs, on the account of the request's tenant, while its client is there.

    Args:
        tenant, prompts: for the log.
    """
    num_tokens = sum(map(len, inputs))
    record = RequestRecord.of(request.scope)
    record.details |= {"model": encoder.name, "tenant": tenant, "prompt_tokens": num_tokens}
    if options.log_prompts:
        record.details["prompts"] = list(prompts)
    account = account_of(request.scope)
    with account.admit(num_tokens) as admission:
        meter = partial(account.usage.serve, 0)
        try:
            running = encoder.run(inputs, adapter=record.adapter, meter=meter)
            results = await run_while_connected(request.receive, running)
        except QueueFullError:
            raise
        except BaseException:  # the client has gone, but what it asked for is under way
            _charge(admission, account, num_tokens)
            raise
        _charge(admission, account, num_tokens)
    metrics.prompt_tokens.labels(encoder.name).inc(num_tokens)
    return results


def check_count(count: int, options: ServeOptions, *, place: str) -> None:
    """
    Raises:
        OptionError: a request has more texts than one may have; `place` is the first beyond.
    """
    if count > options.max_prompts:
        raise OptionError(
            f"there are {count} texts; the most is {options.max_prompts}",
            hint="send several requests",
            option=place,
        )


def check_tokens(num_tokens: int, options: ServeOptions, *, place: str) -> None:
    """
    Raises:
        RequestError: what is at a place has more tokens than a request may.
    """
    limit = options.max_prompt_tokens
    if limit is not None and num_tokens > limit:
        with naming(prompt=place):
            raise ContextLengthError(
                f"{place} has {num_tokens} tokens; max_prompt_tokens is {limit}", hint="shorten the text"
            )


def usage_of(num_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def _prepare_all(asked: Seq[Asked[Any]]) -> list[Prepared[Any]]:
    prepared = []
    for one in asked:
        with naming({name: f"{one.place}.{name}" for name in ("head", "tail")}, prompt=one.place):
            prepared.append(one.prepare())
    return prepared


def _charge(admission: Admission, account: Tenant, num_tokens: int) -> None:
    admission.used_tokens = num_tokens
    account.usage.begin(num_tokens)
