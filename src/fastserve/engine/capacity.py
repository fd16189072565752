"""How long a context and how large a batch and a KV pool a model is compiled for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fastserve.backends.native.adapters import adapter_bytes
from fastserve.backends.native.cores import count_cores
from fastserve.backends.native.layout import Layout, lay_out
from fastserve.backends.native.weight_scheme import WeightScheme
from fastserve.backends.prefix import prefix_blocks
from fastserve.config import DEFAULT_CONTEXT_LENGTH, EngineOptions
from fastserve.engine.footprint import BLOCK_SIZE, Footprint, block_bytes, weights_bytes
from fastserve.errors import ContextLengthError, MemoryLimitError
from fastserve.graph.memory import plan_memory, rows_of
from fastserve.graph.node import Attention, Graph, Parameter, Rows
from fastserve.types import Limits

logger = logging.getLogger(__name__)

# Enough for several long sequences of a small model; whoever serves many asks for more.
MAX_DERIVED_KV_BYTES = 2**30
_SPECULATION_OUTPUTS = 32  # a row of logits each; with more sequences than that, they have as many anyway
# Of a step, unless options say otherwise. Nobody waits for a token of an encoder, and the fewer steps there
# are, the less often a thread waits for the last text of another (docs/log.md: 3 to 17 % faster than 512).
DECODER_BATCH_TOKENS, ENCODER_BATCH_TOKENS = 512, 2048


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a model is compiled for, the memory that it takes, and, of the native backend, where it lies."""

    limits: Limits
    footprint: Footprint
    layout: Layout | None
    encoder_layout: Layout | None = None  # of an encoder-decoder's encoder


def choose_context_length(
    options: EngineOptions,
    model_context: int,
    *,
    usual_context: int | None = None,
    changes_beyond: bool = True,
) -> int:
    """What the options ask for, else the most that is usual, of the model and of ours.

    Texts longer than `usual_context` take asking: they make some models compute all texts otherwise
    (LongRoPE; `changes_beyond`), which is logged; others were not trained on them.

    Raises:
        ContextLengthError: more is asked for than the model was made for.
    """
    if options.context_length is None:
        return min(usual_context or model_context, DEFAULT_CONTEXT_LENGTH)
    if options.context_length > model_context:
        raise ContextLengthError(
            f"context_length is {options.context_length}; the model was made for {model_context} tokens",
            hint=f"choose a context_length of at most {model_context}",
        )
    if changes_beyond and usual_context is not None and options.context_length > usual_context:
        logger.warning(
            "context_length is %d: all texts use the rotary factors for those of more than %d tokens;"
            " context_length=%d keeps the factors for shorter ones",
            options.context_length,
            usual_context,
            usual_context,
        )
    return options.context_length


def plan_capacity(
    graph: Graph,
    options: EngineOptions,
    *,
    schemes: Mapping[Parameter, WeightScheme],
    context_length: int,
    available_bytes: int | None,
    encoder: Graph | None = None,
    num_prefix_tokens: int = 0,
) -> Capacity:
    """The capacities to compile for. Of an encoder-decoder, `graph` is its decoder's; sources and targets
    each have a context. A prefix has blocks of its own, and positions before those of the context.

    The KV pool has as many whole blocks as `kv_memory` holds. Without it, it holds what `max_sequences` could
    fill, within half of the memory that the rest leaves and MAX_DERIVED_KV_BYTES, but at least one whole
    context.

    Raises:
        MemoryLimitError: `kv_memory` does not hold a block, or not the whole text that a step of an encoder
            takes.
    """
    # Of a head for whole texts each text is run at once, whatever its attention.
    generates = all(node.causal for node in graph.nodes if isinstance(node, Attention)) and not any(
        value.rows is Rows.SEQUENCES for value in graph.outputs.values()
    )
    num_prefix_blocks = prefix_blocks(num_prefix_tokens, BLOCK_SIZE)
    max_tokens = _choose_batch_tokens(
        options, context_length, generates=generates, reads_whole=not generates or encoder is not None
    )
    limits = Limits(
        max_tokens=max_tokens,
        max_outputs=_max_outputs(options, max_tokens),
        max_sequences=options.max_sequences,
        num_blocks=(2 if encoder else 1) * -(-context_length // BLOCK_SIZE) + num_prefix_blocks,  # at least
        max_context=context_length + num_prefix_blocks * BLOCK_SIZE,
        num_adapter_slots=options.num_adapter_slots,
        max_adapter_rank=options.max_adapter_rank,
    )
    # A causal sequence keeps its keys and values from step to step; an encoder's live for one step.
    most_tokens = context_length * limits.max_sequences if generates else limits.max_tokens
    if encoder is not None:
        most_tokens *= 2
    most_blocks = most_tokens // BLOCK_SIZE + limits.max_sequences + num_prefix_blocks
    graphs = [graph] if encoder is None else [graph, encoder]
    whole = graph.beside(encoder) if encoder else graph
    layouts = [lay_out(each, schemes, limits) for each in graphs] if options.backend == "native" else []
    threads = options.threads or count_cores().threads
    footprint = Footprint(
        weights_bytes=weights_bytes(whole, schemes) + adapter_bytes(whole, schemes, limits),
        activation_bytes=sum(layout.num_bytes(threads) for layout in layouts)
        if layouts
        else max(plan_memory(each, rows_of(limits)).size_bytes for each in graphs),
        kv_bytes=0,
    )
    layout, encoder_layout = (*layouts, None, None)[:2]
    per_block = block_bytes(graph, options.kv_dtype, options.backend)
    if options.kv_memory_bytes is not None:
        num_blocks = options.kv_memory_bytes // per_block
        _check_kv_memory(num_blocks, num_prefix_blocks + 1 if generates else limits.num_blocks, per_block)
    else:
        spare_bytes = MAX_DERIVED_KV_BYTES
        if available_bytes is not None:
            spare_bytes = min(spare_bytes, (available_bytes - footprint.total_bytes) // 2)
        num_blocks = max(limits.num_blocks, min(most_blocks, spare_bytes // per_block))
    return Capacity(
        replace(limits, num_blocks=num_blocks),
        replace(footprint, kv_bytes=num_blocks * per_block),
        layout,
        encoder_layout,
    )


def _choose_batch_tokens(
    options: EngineOptions, context_length: int, *, generates: bool, reads_whole: bool
) -> int:
    """`reads_whole`: texts are read in one step, however long they are."""
    tokens = options.max_batch_tokens or (DECODER_BATCH_TOKENS if generates else ENCODER_BATCH_TOKENS)
    return max(tokens, context_length) if reads_whole else tokens


def _max_outputs(options: EngineOptions, max_tokens: int) -> int:
    """One for each sequence that runs, and room for the drafts of a few."""
    if options.speculation == "off":
        return options.max_sequences
    wanted = options.max_sequences * (1 + options.max_draft_tokens)
    room = max(_SPECULATION_OUTPUTS, 1 + options.max_draft_tokens)
    return max(options.max_sequences, min(wanted, room, max_tokens))


def _check_kv_memory(num_blocks: int, least_blocks: int, per_block: int) -> None:
    if num_blocks < least_blocks:
        raise MemoryLimitError(
            f"kv_memory holds {num_blocks} blocks of {BLOCK_SIZE} tokens; the least is {least_blocks}",
            hint=f"choose kv_memory={least_blocks * per_block} or more",
        )
