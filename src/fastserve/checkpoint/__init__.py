"""Model directories on disk to tensors, tokenizers and templates in memory."""
