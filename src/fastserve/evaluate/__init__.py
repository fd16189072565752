"""Measurements: how fast the machine, the kernels and whole models are, ours and others."""
