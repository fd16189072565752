"""Sequences, KV blocks, scheduling, sampling and the step loop."""
