"""The reference backend: interprets a graph with PyTorch, one function an op, on any torch device."""
