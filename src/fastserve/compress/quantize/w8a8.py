"""Prepares a model for W8A8 as other engines compute it: one scale of int8 for all activations of a token.

Inputs that norms make are smoothed (`smoothquant`). What then still loses too much is found by gradients, and
left alone: these matrices meet activations as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.compress.calibration import torch_threads
from fastserve.compress.quantize.rounded_inputs import keep_costly, measure_losses
from fastserve.compress.quantize.smoothquant import SmoothQuant
from fastserve.compress.step import Context, WorkingModel
from fastserve.engine.llm import LLM
from fastserve.models.config import DecoderConfig
from fastserve.models.family import read_config
from fastserve.models.matrices import find_matrices
from fastserve.types import SamplingParams

# Measured on SmolLM2-135M (docs/log.md): 0.5 leaves more to activations, 0.8 more to weights.
ALPHA = 0.65
MOST_LOSS = 0.001  # as `rounded_inputs` has it
NUM_SEQUENCES, LENGTH = 16, 128


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model ready to be written as W8A8.

    Attributes:
        checkpoint: of the same function, its scales moved from activations to weights.
        float_activations: names of matrices that meet activations as they are.
        loss_of_all, loss: estimated, where all matrices met int8, and where these do not.
    """

    checkpoint: Checkpoint
    float_activations: frozenset[str]
    loss_of_all: float
    loss: float

    @property
    def line(self) -> str:
        """About it, for a person."""
        return (
            f"{len(self.float_activations)} matrices meet activations as they are: rounding the rest loses an"
            f" estimated {self.loss:.4f}, rounding all would lose {self.loss_of_all:.4f}"
            " (nats a token; of encoders the squared change of embeddings)"
        )


def prepare_w8a8(
    checkpoint: Checkpoint,
    sequences: Seq[Seq[int]],
    *,
    alpha: float = ALPHA,
    most_loss: float = MOST_LOSS,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Prepared:
    """Smooth a model, and choose the matrices whose activations stay as they are: of the inputs that lose
    most, as few as bring the estimated loss of the others down to `most_loss`.

    Args:
        sequences: of token ids, that show what activations are like.

    Raises:
        CheckpointError, UnsupportedError: the model cannot be run.
    """
    names = find_matrices(checkpoint).linears
    model = WorkingModel(checkpoint=checkpoint)
    with TemporaryDirectory(prefix="fastserve-w8a8-") as scratch, torch_threads(None):
        context = Context(
            source=checkpoint.path, scratch=Path(scratch), calibration=sequences, progress=progress
        )
        smooth = SmoothQuant(alpha=alpha).smooth(model, context)
        losses = measure_losses(smooth, names, sequences, progress=progress)
    kept = keep_costly(losses, most_loss)
    return Prepared(smooth.checkpoint, kept.names, sum(losses.values()), kept.loss)


def sample_texts(
    path: Path,
    checkpoint: Checkpoint,
    *,
    num_sequences: int = NUM_SEQUENCES,
    length: int = LENGTH,
    seed: int = 0,
) -> list[list[int]]:
    """Token ids of texts where there are none: those that a decoder itself writes, each from a token that is
    drawn evenly on (as in LLM-QAT, arXiv 2305.17888); for an encoder, tokens that are drawn evenly.
    """
    config = read_config(checkpoint.config)
    random = np.random.default_rng(seed)
    length = min(length, config.max_context)
    if not isinstance(config, DecoderConfig):
        drawn: list[list[int]] = random.integers(0, config.vocab_size, (num_sequences, length)).tolist()
        return drawn
    first = [[int(token_id)] for token_id in random.integers(0, config.vocab_size, num_sequences)]
    params = [
        SamplingParams(max_tokens=length - 1, temperature=1.0, seed=seed + index, ignore_eos=True)
        for index in range(num_sequences)
    ]
    with LLM(path, context_length=length, offline=True) as llm:
        completions = llm.generate(first, params)
    return [[*begin, *made.token_ids] for begin, made in zip(first, completions, strict=True)]
