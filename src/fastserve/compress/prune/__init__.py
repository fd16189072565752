"""Pruning: entries of matrices set to zero, or whole neurons, heads and layers taken out."""
