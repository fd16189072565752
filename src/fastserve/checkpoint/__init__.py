"""Model directories on disk to tensors, tokenizers and templates in memory."""

from fastserve.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat

__all__ = ["Checkpoint", "StoredTensor", "TensorFormat", "open_checkpoint"]
