"""Products with packed weights: torch, numba, Triton."""
