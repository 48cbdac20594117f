"""Recorded steps as programs of compiled loops: numba."""
