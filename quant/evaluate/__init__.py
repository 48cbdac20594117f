"""Perplexity, fidelity and tasks of models that pass block by block."""
