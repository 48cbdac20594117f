"""Training of the demo models, and sweeps."""
