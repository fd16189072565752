"""Quantization: steps that give matrices as whole numbers with scales."""
