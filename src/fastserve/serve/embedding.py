"""From the texts of a request to their embeddings: the one way of all routes that embed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial

import numpy as np
from starlette.requests import Request

from fastserve.engine.async_encoder import AsyncEncoder
from fastserve.engine.prompt import Prompt, encode_text
from fastserve.errors import ContextLengthError, OptionError, QueueFullError
from fastserve.option import check_integer
from fastserve.serve.connection import run_while_connected
from fastserve.serve.errors import naming
from fastserve.serve.limiter import Admission
from fastserve.serve.metrics import Metrics
from fastserve.serve.options import ServeOptions
from fastserve.serve.record import RequestRecord
from fastserve.serve.security import account_of
from fastserve.serve.tenant_table import Tenant
from fastserve.types import Float32Array


@dataclass(frozen=True, slots=True)
class Embedded:
    """The embeddings of a request's texts, [texts, width], and their tokens."""

    vectors: Float32Array
    num_tokens: int

    @property
    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.num_tokens, "total_tokens": self.num_tokens}


async def embed(
    encoder: AsyncEncoder,
    texts: Seq[tuple[str, Prompt]],
    request: Request,
    *,
    options: ServeOptions,
    metrics: Metrics,
    tenant: str,
    truncate: bool,
) -> Embedded:
    """Embed texts, or token ids that are used as they are, each with its place in the request; see
    `name_texts`. The tenant is for the log.

    Raises:
        RequestError: a token is not in the vocabulary, or a text is longer than the model's limit.
        OptionError: they are too many.
        RateLimitError: the tenant is over one of its limits.
        QueueFullError, StepError: see `AsyncEncoder.embed`.
    """
    if len(texts) > options.max_prompts:
        raise OptionError(
            f"there are {len(texts)} texts to embed; the most is {options.max_prompts}",
            hint="send several requests",
            option=texts[options.max_prompts][0],
        )
    token_ids = await asyncio.to_thread(_encode_all, encoder, texts, truncate)
    for (place, _), own in zip(texts, token_ids, strict=True):
        limit = options.max_prompt_tokens
        if limit is not None and len(own) > limit:
            with naming(prompt=place):
                raise ContextLengthError(
                    f"{place} has {len(own)} tokens; max_prompt_tokens is {limit}", hint="shorten the text"
                )
    num_tokens = sum(map(len, token_ids))
    record = RequestRecord.of(request.scope)
    record.details |= {"model": encoder.name, "tenant": tenant, "prompt_tokens": num_tokens}
    if options.log_prompts:
        record.details["prompts"] = [text for _, text in texts]
    account = account_of(request.scope)
    with account.admit(num_tokens) as admission:
        meter = partial(account.usage.serve, 0)
        try:
            vectors = await run_while_connected(request.receive, encoder.embed(token_ids, meter=meter))
        except QueueFullError:
            raise
        except BaseException:  # the client has gone, but what it asked for is under way
            _charge(admission, account, num_tokens)
            raise
        _charge(admission, account, num_tokens)
    metrics.prompt_tokens.labels(encoder.name).inc(num_tokens)
    return Embedded(vectors, num_tokens)


def _charge(admission: Admission, account: Tenant, num_tokens: int) -> None:
    admission.used_tokens = num_tokens
    account.usage.begin(num_tokens)


def shorten(vectors: Float32Array, dimensions: int | None) -> Float32Array:
    """The first dimensions of embeddings, normalized anew (Matryoshka representations, arXiv 2205.13147).

    Raises:
        OptionError: they have not so many.
    """
    if dimensions is None:
        return vectors
    check_integer("dimensions", dimensions, low=1, high=vectors.shape[1])
    return vectors if dimensions == vectors.shape[1] else normalize(vectors[:, :dimensions])


def normalize(vectors: Float32Array) -> Float32Array:
    """Each of length 1; those without length stay as they are."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def _encode_all(encoder: AsyncEncoder, texts: Seq[tuple[str, Prompt]], truncate: bool) -> list[Seq[int]]:
    token_ids = []
    for place, text in texts:
        with naming(prompt=place):
            token_ids.append(_encode(encoder, text, place, truncate))
    return token_ids


def _encode(encoder: AsyncEncoder, text: Prompt, place: str, truncate: bool) -> Seq[int]:
    model = encoder.model
    if isinstance(text, str):
        return encode_text(model, text, truncate=truncate)
    for index, token_id in enumerate(text):
        check_integer(f"{place}[{index}]", token_id, low=0, high=model.executable.vocab_size - 1)
    if len(text) > model.context_length and not truncate:
        raise ContextLengthError(
            f"{place} has {len(text)} tokens; the model embeds at most {model.context_length}",
            hint="split the text, or ask for truncation",
        )
    return text[: model.context_length]
