"""Whether a model writes text, or reads it: what it is judged and timed by."""

from __future__ import annotations

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.errors import UnsupportedError
from fastserve.models.config import DecoderConfig, EncoderDecoderConfig
from fastserve.models.family import read_config
from fastserve.models.task import read_task


def writes_text(checkpoint: Checkpoint) -> bool:
    """Whether a model is a decoder that generates; false of encoders, and of decoders with another head.

    Raises:
        UnsupportedError: it is an encoder-decoder.
    """
    config = read_config(checkpoint.config)
    if isinstance(config, EncoderDecoderConfig):
        raise UnsupportedError(
            f"{checkpoint.path} is an encoder-decoder, which compression does not take yet",
            hint="`fastserve convert --to compressed-tensors` rounds its weights",
        )
    is_decoder = isinstance(config, DecoderConfig)
    return read_task(checkpoint.config, checkpoint.card, is_decoder=is_decoder).task == "generate"
