"""Compression: a model directory made smaller and faster, the loss measured; needs the extra `[compress]`."""
