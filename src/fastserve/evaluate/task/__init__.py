"""What each task is: rows to a model's inputs, its logits to predictions, predictions to scores."""
