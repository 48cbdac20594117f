"""Types, grids, statistics, block stream and run directory: what every method stands on."""
