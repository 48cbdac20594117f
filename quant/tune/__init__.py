"""Codes and scales that a solver found, moved on by gradients of what they are for: a block's output, or the model's."""
