"""Tools of the project: sweeps, golden values, demo models, figures, the page of the architecture."""
