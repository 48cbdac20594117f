"""A decoder block as a function of its weights: streamed activations, fake quantization."""
