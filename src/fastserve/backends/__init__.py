"""Backends compile a graph into something that runs."""
