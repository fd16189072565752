"""From the texts of a request to their embeddings: the one way of all routes that embed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from starlette.requests import Request

from fastserve.engine.async_encoder import AsyncEncoder
from fastserve.engine.encoder import EncoderInput
from fastserve.engine.prompt import Prompt, encode_text
from fastserve.errors import ContextLengthError
from fastserve.option import check_integer
from fastserve.serve.errors import naming
from fastserve.serve.metrics import Metrics
from fastserve.serve.options import ServeOptions
from fastserve.serve.prediction import check_count, check_tokens, run_inputs, usage_of
from fastserve.types import Float32Array


@dataclass(frozen=True, slots=True)
class Embedded:
    """The embeddings of a request's texts, [texts, width], and their tokens."""

    vectors: Float32Array
    num_tokens: int

    @property
    def usage(self) -> dict[str, int]:
        return usage_of(self.num_tokens)


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
        QueueFullError, StepError: see `AsyncEncoder.run`.
    """
    check_count(len(texts), options, place=texts[min(options.max_prompts, len(texts) - 1)][0])
    token_ids = await asyncio.to_thread(_encode_all, encoder, texts, truncate)
    for (place, _), own in zip(texts, token_ids, strict=True):
        check_tokens(len(own), options, place=place)
    vectors = await run_inputs(
        encoder,
        [EncoderInput(own) for own in token_ids],
        request,
        options=options,
        metrics=metrics,
        tenant=tenant,
        prompts=[text for _, text in texts],
    )
    return Embedded(np.stack(vectors), sum(map(len, token_ids)))


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
