"""The classic tasks: what a user gives to inputs of an encoder, and its logits to predictions."""
